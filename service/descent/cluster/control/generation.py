"""The generation as the controller has formed it, and which workers hold the run's state."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from descent.cluster.control import policy
from descent.cluster.workers.group import Handle
from descent.messages import WorkerState, WorkerStatus

_WITHOUT_STATE = ("running", "restore", "join", "receive")
"""Phases of a generation in which a member that is behind may not have the state yet."""


@dataclass
class Generation:
    """The current one; 0 before the first."""

    number: int = 0
    members: tuple[str, ...] = ()
    """Worker ids, by rank."""


class StateHolders:
    """The workers that hold the state: who is told to receive it does so only once it has."""

    def __init__(self) -> None:
        self._joined: set[str] = set()
        self._receiving: dict[str, int] = {}
        """Members that don't hold the state yet, and the step that they will have when they do."""
        self._differed: set[str] = set()

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._joined

    def expect(self, decision: policy.Form, handles: Mapping[str, Handle], saved_step: int) -> None:
        """A generation is being formed: its source may die before those behind have received the state."""
        source = handles[decision.workers[0]].status
        step = saved_step if decision.restore else source.step if source else 0
        # Before the first step all hold the same, whoever sends: the seed decides it.
        # A checkpoint nobody holds until all have exchanged what they read of it.
        ranks = range(len(decision.workers)) if decision.restore else decision.behind
        awaited = {decision.workers[rank] for rank in ranks} if step > 0 else set()
        self._joined.update(set(decision.workers) - awaited)
        self._receiving = dict.fromkeys(awaited - self._joined, step)
        # One that differed has the step already, and not the state.
        self._differed = {w for w in self._receiving if (status := handles[w].status) and status.step >= step}

    def hear(self, status: WorkerStatus, generation: int) -> None:
        """Note when a member of the current generation has received what it was to receive."""
        step = self._receiving.get(status.worker_id)
        if step is None or status.generation != generation or status.step < step:
            return
        before = status.phase in _WITHOUT_STATE or status.state is WorkerState.BROKEN
        if not (before and status.worker_id in self._differed):
            self._joined.add(status.worker_id)
            del self._receiving[status.worker_id]

    def differ(self, workers: Iterable[str]) -> None:
        """The state of these isn't the majority's: it must be received anew."""
        self._joined -= set(workers)

    def lose_all(self) -> None:
        """Nobody holds the state any more."""
        self._joined = set()
