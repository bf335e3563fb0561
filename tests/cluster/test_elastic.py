"""Growing, shrinking, goodbyes and spares in a real run; the oracle is the undisturbed run with one worker."""

import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.runs import (
    DESCENT,
    dawdling,
    end,
    incidents_of,
    logged_steps,
    members_of,
    slow_network,
    start,
    wait_for_step,
    workers_of,
)
from tests.end_to_end.services import until

MODULE = """
class Marked(Slow):
    '''Something befalls one process, once, at its n-th micro-batch of training.'''

    def __init__(self, n=40):
        super().__init__()
        self.calls, self.n = 0, n

    def forward(self, x):
        self.calls += self.training
        if self.training and self.calls == self.n:
            try:
                os.close(os.open(type(self).__name__, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                self.befall()
        return super().forward(x)

class Unlucky(Marked):
    '''Raises: as on a machine with a fault of its own.'''

    def befall(self):
        raise OSError("a cosmic ray")

class Stuck(Marked):
    '''Doesn't come back: as in a driver that hangs.'''

    def befall(self):
        time.sleep(600)

class Tired(Marked):
    '''Six times slower from then on: as beside a busy neighbour.'''

    def __init__(self):
        super().__init__(20)
        self.rest = 0.0

    def befall(self):
        self.rest = 0.15

    def forward(self, x):
        time.sleep(self.rest if self.training else 0)
        return super().forward(x)
"""
STEPS = 120
ROOM = ["resources.cpus=0.25", "slots=4", f"steps={STEPS}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elastic")
    (path / "nets.py").write_text(slow_network(0.03, path) + MODULE)
    return path


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, Any]:
    code, summary, err = end(start(folder, "undisturbed", "Slow", *ROOM, "workers=1"))
    assert code == 0, err
    return summary


def assert_nothing_tells(
    folder: Path, name: str, ended: tuple[int, dict[str, Any], str], undisturbed: dict[str, Any]
) -> None:
    code, summary, err = ended
    assert code == 0, err
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert summary["eval/loss"] == undisturbed["eval/loss"]
    assert logged_steps(folder, name) == list(range(1, STEPS + 1))


def scale(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([DESCENT, "scale", *arguments], cwd=folder, capture_output=True, text=True, timeout=120)


def worlds(err: str) -> list[int]:
    """The sizes of the generations after the first."""
    return [int(n) for n in re.findall(r"generation \d+: (\d) worker", err)]


def test_a_run_grows_and_shrinks_on_request(folder: Path, undisturbed: dict[str, Any]) -> None:
    run = start(folder, "scaled", "Slow", *ROOM, "workers=1")
    wait_for_step(run, folder, "scaled", 10)
    with dawdling(folder):
        refused = scale(folder, "scaled", "workers=5")
        assert refused.returncode != 0 and "slots=4" in refused.stderr
        for workers in (3, 2):
            asked = scale(folder, "scaled", f"workers={workers}")
            assert asked.returncode == 0 and f"{workers} wanted" in asked.stdout, asked.stderr
            until(lambda n=workers: len(members_of(folder, "scaled")) == n, f"{workers} workers")  # type: ignore[misc]
    ended = end(run)
    assert_nothing_tells(folder, "scaled", ended, undisturbed)
    assert ended[1]["incidents"] == 0 and worlds(ended[2])[-1] == 2 and 3 in worlds(ended[2])
    over = scale(folder, "scaled", "workers=1")
    assert over.returncode != 0 and "is not running (FINISHED)" in over.stderr


def test_a_sigterm_to_a_worker_is_a_goodbye_that_costs_nothing(folder: Path, undisturbed: dict[str, Any]) -> None:
    run = start(folder, "goodbye", "Slow", *ROOM, "workers=2", "regroup.max_failures=0")
    wait_for_step(run, folder, "goodbye", 15)
    os.kill(workers_of(run)[0].pid, signal.SIGTERM)
    ended = end(run)
    assert_nothing_tells(folder, "goodbye", ended, undisturbed)
    (incident,) = incidents_of(folder, "goodbye")
    assert incident["kind"] == "preempted"
    assert incident["steps_lost"] == incident["samples_replayed"] == 0


def test_a_spare_takes_a_lost_workers_place_at_once(folder: Path, undisturbed: dict[str, Any]) -> None:
    run = start(folder, "spare", "Slow", *ROOM, "workers=2", "spares=1")
    wait_for_step(run, folder, "spare", 15)
    with dawdling(folder):
        until(lambda: len(workers_of(run)) == 3, "the spare")
    workers_of(run)[0].kill()
    ended = end(run)
    assert_nothing_tells(folder, "spare", ended, undisturbed)
    assert [i["kind"] for i in incidents_of(folder, "spare")] == ["worker lost"]


def test_an_exception_that_only_one_worker_raises_once_is_retried_elsewhere(
    folder: Path, undisturbed: dict[str, Any]
) -> None:
    ended = end(start(folder, "unlucky", "Unlucky", *ROOM, "workers=2"))
    assert_nothing_tells(folder, "unlucky", ended, undisturbed)
    (incident,) = incidents_of(folder, "unlucky")
    assert incident["kind"] == "worker lost" and "a cosmic ray" in incident["detail"]


def test_who_is_stuck_is_replaced_and_who_waits_for_it_keeps_the_state(
    folder: Path, undisturbed: dict[str, Any]
) -> None:
    ended = end(
        start(
            folder,
            "stuck",
            "Stuck",
            *ROOM,
            "workers=3",
            "regroup.stall_s=10",
            "regroup.max_failures=1",
        )
    )
    assert_nothing_tells(folder, "stuck", ended, undisturbed)
    (incident,) = incidents_of(folder, "stuck")
    assert incident["kind"] == "worker lost" and "stuck in 'forward'" in incident["detail"]
    assert incident["steps_lost"] == 0 and incident["worker"] not in ended[1]["workers"]


def test_a_lasting_straggler_is_named_with_its_host_and_replaced(folder: Path, undisturbed: dict[str, Any]) -> None:
    ended = end(
        start(
            folder,
            "tired",
            "Tired",
            *ROOM,
            "workers=3",
            "spares=1",
            "straggler.after_s=1",
            "straggler.replace=true",
            "regroup.max_failures=0",
        )
    )
    assert_nothing_tells(folder, "tired", ended, undisturbed)
    found = incidents_of(folder, "tired")
    slow = next(i for i in found if i["kind"] == "straggler")
    assert slow["host"] == socket.gethostname()
    assert slow["worker"] not in ended[1]["workers"] and len(ended[1]["workers"]) == 3
