"""The one double of a worker group, which a test speaks for; and a clock that a test moves.

The group starts nothing: it keeps what the controller asked of each worker (`sent`), and its poll returns
the answers that the test has put into `answers`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from descent.cluster.workers.group import WorkerInfo
from descent.messages import Acknowledged, Fault, Membership, WorkerStatus


class ManualClock:
    """Time stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


class ScriptedGroup:
    """A `WorkerGroup` without workers."""

    def __init__(self, clock: ManualClock, free: int) -> None:
        self._clock = clock
        self.free = free
        """Workers that can still be started."""
        self.known: dict[str, WorkerInfo] = {}
        self.answers: list[WorkerStatus] = []
        """What the next poll returns."""
        self.sent: list[tuple[str, str, Any]] = []
        """(command, worker, its argument), in order."""
        self.silent: set[str] = set()
        """Workers that don't answer any more."""
        self.polled: dict[str, bool] = {}
        """Workers with an unanswered poll, and whether that poll asks for records."""
        self.answered_at: dict[str, float] = {}
        self.owned = True
        """Whether the cluster is the run's own."""
        self.on_poll: Callable[[], None] = lambda: None
        """Called before each poll: a test may answer there."""
        self.lost_cluster: str | None = None
        self.draining: set[str] = set()
        """Ids of nodes."""

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        return self.known

    def start(self, count: int) -> list[str]:
        started = [f"w{len(self.known) + i}" for i in range(count)]
        for worker_id in started:
            self.known[worker_id] = WorkerInfo(worker_id)
            self.answered_at[worker_id] = self._clock.now
            self.sent.append(("start", worker_id, None))
        self.free -= count
        return started

    def room(self) -> int:
        return self.free

    def capacity(self) -> int:
        return self.free + sum(not worker.dead for worker in self.known.values())

    def owns_cluster(self) -> bool:
        return self.owned

    def cluster_failure(self) -> str | None:
        return self.lost_cluster

    def restart_cluster(self) -> None:
        self.lost_cluster = None
        for worker_id, worker in self.known.items():
            if not worker.dead:
                self.die(worker_id, "its cluster was lost", excused=True)
        self.sent.append(("restart", "", None))

    def kill_process(self, name: str, delay_s: float) -> None:
        self.sent.append(("kill process", name, delay_s))

    def draining_nodes(self) -> set[str]:
        return self.draining

    def poll(self, *, acknowledged: Acknowledged, reporter: str | None, wait_s: float) -> list[WorkerStatus]:  # noqa: ARG002
        for worker_id, worker in self.known.items():
            if not worker.dead:
                self.polled.setdefault(worker_id, worker_id == reporter)
        self.on_poll()
        if not self.answers:
            self._clock.now += wait_s
        answers = [status for status in self.answers if not self.known[status.worker_id].dead]
        self.answers.clear()
        for status in answers:
            self.polled.pop(status.worker_id)
            self.known[status.worker_id].status = status
            self.answered_at[status.worker_id] = self._clock.now
        return answers

    def since_answer_s(self, worker_id: str) -> float:
        return self._clock.now - self.answered_at[worker_id]

    def unanswered_s(self, worker_id: str) -> float:
        started = self.known[worker_id].status is not None
        return self.since_answer_s(worker_id) if started and worker_id in self.silent else 0.0

    def die(self, worker_id: str, cause: str = "its process ended", *, excused: bool = False) -> None:
        """The worker's process is gone, as Ray reports it."""
        worker = self.known[worker_id]
        worker.dead, worker.cause, worker.excused = True, cause, excused
        self.polled.pop(worker_id, None)

    def join(self, worker_id: str, membership: Membership) -> None:
        self.sent.append(("join", worker_id, membership))

    def abort(self, worker_id: str, generation: int) -> None:
        self.sent.append(("abort", worker_id, generation))

    def request_pause(self, worker_id: str) -> None:
        self.sent.append(("pause", worker_id, None))

    def request_checkpoint(self, worker_id: str) -> None:
        self.sent.append(("checkpoint", worker_id, None))

    def inject(self, worker_id: str, fault: Fault) -> None:
        self.sent.append(("inject", worker_id, fault))

    def kill(self, worker_id: str, cause: str) -> None:
        self.die(worker_id, cause)
        self.sent.append(("kill", worker_id, cause))

    def release(self, worker_id: str, cause: str) -> None:
        self.die(worker_id, cause, excused=True)
        self.sent.append(("release", worker_id, cause))

    def release_all(self) -> None:
        for worker_id, worker in self.known.items():
            if not worker.dead:
                self.release(worker_id, "released")
