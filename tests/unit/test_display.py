"""What a run shows while it is under way, on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from descent.cluster.run.display import Display
from descent.messages import StepRecord


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
        assert "samples/s" not in out.getvalue()
        display.record(record(10, perf_data_wait=0.125), world_size=2)
        display.record(record(11), world_size=2)  # it comes with every few steps only
        display._lined = 0.0
        display._draw(force=True)
        assert "12.5% of the time waited for" in out.getvalue()
        display.record(record(20, perf_data_wait=0.004), world_size=2)
        display._lined = 0.0
        display._draw(force=True)
    assert "0.4% of the time waited for" in out.getvalue()


def test_a_log_does_not_repeat_itself_while_no_step_is_taken_and_keeps_the_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("descent.cluster.run.display.time.monotonic", lambda: now)
    out = io.StringIO()
    display = Display(Console(file=out, width=200), "a run", total_steps=100, batch_size=32)
    with display:
        for step in range(1, 11):
            now += 1.0
            display.record(record(step), world_size=2)
            display.tick()
        before = out.getvalue().count("step 10/100")
        for _ in range(40):  # evaluating
            now += 1.0
            display.tick()
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step 10/100")]
    assert before <= 1 and 1 <= len(lines) - before <= 2
    assert all(" 32 samples/s" in line for line in lines)
