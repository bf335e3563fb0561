"""The seam between the controller and its workers: what the controller asks of them, whatever runs them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from descent.messages import Acknowledged, Fault, Membership, WorkerStatus


@dataclass
class WorkerInfo:
    """What is known of one worker without asking it."""

    worker_id: str
    status: WorkerStatus | None = None
    """The last answer to a poll; None before the first."""
    dead: bool = False
    """Whether the worker is gone, or was given up: it is never polled again."""
    cause: str = ""
    """Why it is dead, in one sentence."""
    excused: bool = False
    """Whether its death is no failure of the run: it was released, or went with its node."""

    @property
    def host(self) -> str:
        """The name of its machine; empty before its first answer."""
        return self.status.host if self.status is not None else ""


class WorkerGroup(Protocol):
    """All workers of a run, of every generation.

    Ray actors in a run (`ray_group.RayWorkerGroup`); real processes without Ray, or a double that a
    test speaks for, in tests. A group decides nothing. No method but `poll` waits for a worker.
    """

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        """All workers that were ever started, dead ones too, by worker id."""
        ...

    def start(self, count: int) -> list[str]:
        """Start `count` more workers and return their ids; each answers polls as soon as it can."""
        ...

    def room(self) -> int:
        """How many more workers the cluster could start now."""
        ...

    def capacity(self) -> int | None:
        """How many workers the cluster's nodes hold when nothing else runs; None while the cluster doesn't answer."""
        ...

    def owns_cluster(self) -> bool:
        """Whether the cluster is the run's own: it can be started again, and nobody else uses it."""
        ...

    def cluster_failure(self) -> str | None:
        """Why the cluster is lost: an own one with all its workers, another one perhaps for a while; None while it runs."""
        ...

    def restart_cluster(self) -> None:
        """Start a lost cluster again; all workers of before are dead. Raises ClusterError if it can't be started."""
        ...

    def kill_process(self, name: str, delay_s: float) -> None:
        """Kill "raylet" or "gcs" of the run's own cluster, or "driver", this process, after so many seconds (chaos)."""
        ...

    def draining_nodes(self) -> set[str]:
        """Ids of the nodes that will go away soon (a preemption, a scale-down)."""
        ...

    def poll(self, *, acknowledged: Acknowledged, reporter: str | None, wait_s: float) -> list[WorkerStatus]:
        """Ask all living workers for their status; return the answers that are there.

        Returns as soon as there is one answer, else after about `wait_s` seconds. Workers that turn
        out to be dead are marked so. `reporter` is the one whose records are asked for.
        """
        ...

    def since_answer_s(self, worker_id: str) -> float:
        """Seconds since the worker's last answer; before the first: since it was started."""
        ...

    def unanswered_s(self, worker_id: str) -> float:
        """Seconds since the unanswered poll was sent, without the time in which the controller was busy.

        0 for a worker that has never answered: it may still be starting.
        """
        ...

    def join(self, worker_id: str, membership: Membership) -> None:
        """Send the worker its place in a new generation."""
        ...

    def abort(self, worker_id: str, generation: int) -> None:
        """Ask the worker to leave `generation` (or an older one) at once, in the middle of a step."""
        ...

    def request_pause(self, worker_id: str) -> None:
        """Let the worker vote for all members to stop at the end of the step."""
        ...

    def request_checkpoint(self, worker_id: str) -> None:
        """Let the worker vote for a checkpoint at the end of the step."""
        ...

    def inject(self, worker_id: str, fault: Fault) -> None:
        """Let a fault strike the worker (chaos)."""
        ...

    def kill(self, worker_id: str, cause: str) -> None:
        """End a worker that doesn't react any more, and mark it as dead."""
        ...

    def release(self, worker_id: str, cause: str) -> None:
        """End a worker that isn't needed; its death is excused."""
        ...

    def release_all(self) -> None:
        """End all workers."""
        ...
