"""Faults in a real run on real Ray actors, driven through the command line; the oracle is the undisturbed run."""

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.runs import (
    dawdling,
    end,
    incidents_of,
    logged_steps,
    slow_network,
    start,
    wait_for_step,
    workers_of,
)
from tests.end_to_end.services import until

STEPS = 120
MODULE = """
class Greedy(nn.Sequential):
    '''Fits a micro-batch of 4 samples and no more.'''

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        if self.training and len(x) > 4:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return super().forward(x)

class Broken(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.training and self.calls > 20:
            raise ValueError("my own mistake")
        return super().forward(x)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults")
    (path / "nets.py").write_text(slow_network(0.03, path) + MODULE)
    return path


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, Any]:
    code, summary, err = end(start(folder, "undisturbed", "Slow", f"steps={STEPS}"))
    assert code == 0, err
    return summary


@pytest.mark.parametrize(("fault", "heartbeat"), [(signal.SIGKILL, 10.0), (signal.SIGSTOP, 2.0)])
def test_a_worker_that_dies_or_hangs_costs_no_step_and_no_bit(
    folder: Path, undisturbed: dict[str, Any], fault: signal.Signals, heartbeat: float
) -> None:
    name = fault.name.lower()
    process = start(folder, name, "Slow", f"steps={STEPS}", f"regroup.heartbeat_s={heartbeat}")
    wait_for_step(process, folder, name, 15)
    workers = workers_of(process)
    assert len(workers) == 2
    os.kill(workers[0].pid, fault)
    code, summary, err = end(process)
    assert code == 0, err
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert summary["eval/loss"] == undisturbed["eval/loss"]
    assert logged_steps(folder, name) == list(range(1, STEPS + 1))
    (incident,) = incidents_of(folder, name)
    assert incident["kind"] == "worker lost" and incident["steps_lost"] == 0
    assert incident["samples_replayed"] == 30
    # One sentence of our own, whatever the raylet has to say about it.
    assert "raylet" not in err and "SYSTEM_ERROR" not in err, err
    assert incident["detail"] in ("its process ended (killed, crashed or out of memory)", "no answer for 2 s")
    assert incident["recovered_in_s"] > 0


def test_all_workers_killed_the_run_goes_on_from_its_last_checkpoint(folder: Path, undisturbed: dict[str, Any]) -> None:
    process = start(folder, "all", "Slow", f"steps={STEPS}", "checkpoint.every=10")
    wait_for_step(process, folder, "all", 35)
    saved = folder / ".descent" / "runs" / "all" / "checkpoints" / "step-00000030"
    with dawdling(folder):
        until((saved / "manifest.json").is_file, "the checkpoint")
    for worker in workers_of(process):
        worker.kill()
    code, summary, err = end(process)
    assert code == 0, err
    assert "going on from step-000000" in err
    assert summary["steps_lost"] == sum(i["steps_lost"] for i in incidents_of(folder, "all")) < 30
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert logged_steps(folder, "all") == list(range(1, STEPS + 1))


@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_private_cluster_that_dies_is_started_again_and_the_run_goes_on(
    folder: Path, undisturbed: dict[str, Any], victim: str
) -> None:
    process = start(folder, victim, "Slow", f"steps={STEPS}", "checkpoint.every=10")
    wait_for_step(process, folder, victim, 25)
    (found,) = [c for c in psutil.Process(process.pid).children(recursive=True) if c.name() == victim]
    found.kill()
    code, summary, err = end(process)
    assert code == 0, err
    assert "cluster lost" in err and "starting the private cluster again" in err
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert summary["steps_lost"] < 30
    assert logged_steps(folder, victim) == list(range(1, STEPS + 1))


def test_memory_that_runs_out_halves_the_micro_batch_and_goes_on(folder: Path) -> None:
    code, summary, err = end(start(folder, "greedy", "Greedy", "steps=20", "slots=2"))
    assert code == 0, err
    assert summary["step"] == 20
    assert "batch.micro_size=7" in err and "batch.micro_size=3" in err
    assert logged_steps(folder, "greedy") == list(range(1, 21))


def test_an_error_in_the_users_code_ends_the_run_with_the_users_traceback(folder: Path) -> None:
    code, summary, err = end(start(folder, "broken", "Broken", "steps=100"))
    assert code == 1
    assert summary["state"] == "FAILED"
    assert summary["reason"] == "ValueError: my own mistake"
    assert 'raise ValueError("my own mistake")' in err


def test_a_loss_that_is_never_finite_ends_the_run_with_its_reason(folder: Path) -> None:
    code, summary, err = end(
        start(
            folder,
            "hot",
            "Slow",
            "steps=200",
            "optimizer=sgd",
            "optimizer.lr=1e30",
            "regroup.max_bad_steps=3",
        )
    )
    assert code == 1, err
    assert "not finite" in summary["reason"] and "optimizer.lr" in summary["reason"]
