"""The membership protocol as a world that is small enough to be explored whole.

The controller is the real `Controller` (see `machine`); the workers are written down here as pure functions
of one immutable `World`, with every message and every thread's next move as a step of its own that can come
late. `explore` visits all worlds that can be reached, breadth first, and so finds the shortest way to
whatever is wrong.

A message from the controller waits in the worker's inbox (in order, as with Ray's actors) until it is
delivered; a status reaches the controller some time after it became true. What takes place between several
workers (meeting in the store, a reduction) happens at once when all are there; how each of them fares
afterwards is its own step, so that a peer's death leaves survivors at most one step apart. A replica's state
is a function of its step, so the number stands for the tensors.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from descent.cluster.control import policy
from descent.cluster.control.policy import Decision, View
from descent.messages import WorkerState

S = WorkerState


class Violation(Exception):
    """The protocol does what it never may."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules of the protocol; tests break one at a time."""

    decide: Callable[[View], Decision] = policy.decide
    mutate: tuple[tuple[type, str, Any], ...] = ()
    """(class of the controller's, method, what replaces it)."""
    refuses_older: bool = True
    """A worker takes part in newer generations than its last only."""
    obeys_abort: bool = True
    clears_pause_late: bool = False
    """A requested pause is reset when the training thread begins a membership, not when that arrives."""
    only_reporter_sends_records: bool = False
    """A worker that has left its generation keeps its records until it is asked for them."""
    receives: bool = True
    """Members that are behind receive the state."""


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What may happen in one exploration."""

    low: int
    high: int
    room: int = 0
    """Workers that can be started later, in all."""
    faults: int = 2
    kinds: tuple[str, ...] = ("kill",)
    steps: int = 3
    save_every: int = 2
    stop: bool = False
    """Whether the user may ask for the end."""
    prompt: bool = False
    """Leave out what can't matter, where there would be too much of it: the order in which the
    first workers come up, memberships and aborts that are taken up late (they move nothing but
    their own worker), answers that only show progress, and with them the records."""


class Join(NamedTuple):
    """A membership, as sent to one member."""

    generation: int
    rank: int
    members: tuple[int, ...]
    behind: tuple[int, ...]
    restore: int
    """The step of the checkpoint that all begin with; -1: none."""
    save_only: bool


class Status(NamedTuple):
    """The answer to a poll."""

    state: str
    generation: int
    step: int
    leaving: bool


class Worker(NamedTuple):
    """A worker as it really is."""

    life: str = "up"  # up | hung (stopped) | wedged (answers, its thread is stuck) | cut (off the controller) | gone
    state: str = S.STARTING.value
    step: int = 0
    at: str = ""  # within its generation: meet | receive | compute | reduced
    membership: Join | None = None
    incoming: int = 0
    """The source's step, on its way here."""
    votes: bool = False
    """The outcome of the vote that came with the reduction."""
    abort: bool = False
    pause: bool = False
    asked: bool = False
    """For the property: it was asked for a pause in the generation whose membership it got last."""
    leaving: bool = False
    inbox: tuple[Any, ...] = ()
    queue: tuple[Join, ...] = ()
    records: tuple[int, ...] = ()
    shares: tuple[tuple[int, int, int, int], ...] = ()
    """Shares of checkpoints that the controller doesn't know of: (generation, step, rank, world size)."""

    @property
    def generation(self) -> int:
        return -1 if self.membership is None else self.membership.generation

    @property
    def alive(self) -> bool:
        return self.life != "gone"

    @property
    def status(self) -> Status:
        return Status(self.state, self.generation, self.step, self.leaving)


GONE = Worker("gone", "")


class World(NamedTuple):
    """All workers as they are, and the controller's memory by its number (see `machine.Machine.memory`)."""

    workers: tuple[Worker, ...]
    controller: int
    room: int
    faults: int

    def with_worker(self, index: int, **changes: Any) -> "World":
        workers = list(self.workers)
        workers[index] = workers[index]._replace(**changes)
        return self._replace(workers=tuple(workers))
