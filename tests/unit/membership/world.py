"""The membership protocol as a state machine that is small enough to be explored whole.

The policy is the real one (`descent.cluster.control.policy.decide`); around it the controller's
acting on its decisions and the workers' side are written down as pure functions of one
immutable `World`, with every message and every thread's next move as a step of its own
that can come late. `explore` visits all worlds that can be reached, breadth first, and
so finds the shortest way to whatever is wrong.

A message from the controller waits in the worker's inbox (in order, as with Ray's
actors) until it is delivered; a status is heard some time after it became true. What
takes place between several workers (meeting in the store, a reduction) happens at once
when all are there; how each of them fares afterwards is its own step, so that a peer's
death leaves survivors at most one step apart. A replica's state is a function of its
step, so the number stands for the tensors.
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
    """The policy, and the protocol's rules outside of it; tests break one at a time."""

    decide: Callable[[View], Decision] = policy.decide
    told_is_running: bool = True
    """A member that was told to join counts as running until it is heard of there."""
    refuses_older: bool = True
    """A worker takes part in newer generations than its last only."""
    obeys_abort: bool = True
    holds_when_told: bool = False
    """A newcomer counts as a holder of the state as soon as it is told to receive it."""
    clears_pause_late: bool = False
    """The wish for a pause is reset when the thread takes up a membership, not when it is told."""
    only_reporter_tells: bool = False
    """A worker that has left its generation keeps its records to itself until it is asked for them."""
    waits_for_first_answer: bool = False
    """A worker that never answered is waited for without a deadline."""
    receives: bool = True
    """Who is behind receives the state."""


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
    their own worker), news of progress while all is well, and with it the records."""


class Join(NamedTuple):
    """A membership, as told to one member."""

    generation: int
    rank: int
    members: tuple[int, ...]
    behind: tuple[int, ...]
    restore: int
    """The step of the checkpoint that all begin with; -1: none."""
    save_only: bool


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
    """For the property: it was asked for a pause in the generation that it was last told of."""
    leaving: bool = False
    inbox: tuple[Any, ...] = ()
    queue: tuple[Join, ...] = ()
    records: tuple[int, ...] = ()
    parts: tuple[tuple[int, int, int, int], ...] = ()
    """Shares of checkpoints not yet told: (generation, step, rank, world size)."""

    @property
    def generation(self) -> int:
        return -1 if self.membership is None else self.membership.generation

    @property
    def alive(self) -> bool:
        return self.life != "gone"

    @property
    def told(self) -> tuple[str, int, int, bool]:
        """Its status, as a poll tells it."""
        return (self.state, self.generation, self.step, self.leaving)


GONE = Worker("gone", "")


class Control(NamedTuple):
    """The controller's memory."""

    members: tuple[int, ...] = ()
    generation: int = 0
    joined: frozenset[int] = frozenset()
    receiving: tuple[tuple[int, int], ...] = ()
    """(worker, the step that it will have when it holds the state)."""
    heard: tuple[tuple[str, int, int, bool] | None, ...] = ()
    dead: frozenset[int] = frozenset()
    aborting: bool = False
    stalled: frozenset[int] = frozenset()
    """Members whose status tells of no progress for too long."""
    pausing: bool = False
    saving: bool = False
    saved: int = -1
    parts: frozenset[tuple[int, int, int, int]] = frozenset()
    logged: int = 0
    asked: frozenset[int] = frozenset()
    """Whose outstanding poll asks for records."""
    stopping: bool = False
    ended: str = ""


class World(NamedTuple):
    workers: tuple[Worker, ...]
    control: Control
    room: int
    faults: int

    def with_worker(self, index: int, **changes: Any) -> "World":
        workers = list(self.workers)
        workers[index] = workers[index]._replace(**changes)
        return self._replace(workers=tuple(workers))

    def with_control(self, **changes: Any) -> "World":
        return self._replace(control=self.control._replace(**changes))
