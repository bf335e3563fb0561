"""What a run shows while it is under way, on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from service.cluster.display import Display
from service.messages import StepRecord


def record(step: int, **metrics: float) -> StepRecord:
    told = {"train/loss": 1.0 / step} | {k.replace("_", "/", 1): v for k, v in metrics.items()}
    return StepRecord(step, told, 0)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_share_of_time_that_steps_wait_for_data_is_shown_as_last_measured(terminal: bool):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    display = Display(console, "a run", total_steps=100, batch_size=32)
    with display:
        display.record(record(1), world_size=2)
        display._draw(force=True)
        assert "waited for" not in out.getvalue()  # nothing has been measured yet
        display.record(record(10, perf_data_wait=0.125), world_size=2)
        display.record(record(11), world_size=2)  # it comes with every few steps only
        display._lined = 0.0
        display._draw(force=True)
        assert "12.5% of the time waited for" in out.getvalue()
        display.record(record(20, perf_data_wait=0.004), world_size=2)
        display._lined = 0.0
        display._draw(force=True)
    assert "0.4% of the time waited for" in out.getvalue()
