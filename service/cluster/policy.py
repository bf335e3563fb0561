"""What to do next: pure functions from what is known to one decision. No ray, no clock, no state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.messages import RunState, WorkerState

ALIVE_IDLE = (WorkerState.READY, WorkerState.PAUSED, WorkerState.BROKEN, WorkerState.FINISHED)


@dataclass(frozen=True)
class WorkerView:
    """One worker as the controller sees it."""

    state: WorkerState
    dead: bool = False
    generation: int = -1
    progress: tuple[int, int] = (0, -1)
    """(last committed step, last evaluated step)."""
    joined: bool = False
    """Whether it has ever been told of a membership (or restored a checkpoint)."""

    @property
    def idle(self) -> bool:
        return not self.dead and self.state in ALIVE_IDLE


@dataclass(frozen=True)
class View:
    """All that a decision depends on."""

    workers: Mapping[str, WorkerView]
    members: tuple[str, ...]
    """The current generation's, by rank; empty before the first."""
    generation: int
    min_workers: int
    max_workers: int
    failures: int = 0
    max_failures: int = 8
    stopping: bool = False
    waited_s: float = 0.0
    """How long there has been no generation while too few workers are ready."""
    patience_s: float = 60.0
    startable: int = 0
    """How many more workers the cluster could place now."""


@dataclass(frozen=True)
class Wait:
    """Nothing to do until something is heard."""


@dataclass(frozen=True)
class Abort:
    """Tell these members to leave their generation: a peer of theirs is gone."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class Pause:
    """Ask for a vote to stop at the step's end."""

    reason: str


@dataclass(frozen=True)
class Form:
    """Form the next generation of these workers, by rank; `behind` receive rank 0's state."""

    workers: tuple[str, ...]
    behind: tuple[int, ...]


@dataclass(frozen=True)
class Start:
    """Start this many workers."""

    count: int


@dataclass(frozen=True)
class Restore:
    """Nobody is left who holds the state: start afresh from the last checkpoint."""


@dataclass(frozen=True)
class End:
    """The run is over."""

    state: RunState
    reason: str = ""


Decision = Wait | Abort | Pause | Form | Start | Restore | End


def decide(view: View) -> Decision:
    """The next decision. Called whenever something was learned; the same view gives the same answer."""
    alive = {w: v for w, v in view.workers.items() if not v.dead}
    if any(v.state is WorkerState.FAILED for v in view.workers.values()):
        return End(RunState.FAILED, "a worker's code failed")
    if view.failures > view.max_failures:
        return End(
            RunState.FAILED,
            f"{view.failures} failures, regroup.max_failures={view.max_failures}",
        )
    members = [view.workers.get(w) for w in view.members]
    if members and all(
        m is not None and not m.dead and m.state is WorkerState.FINISHED for m in members
    ):
        return End(RunState.FINISHED)
    running = [w for w in view.members if w in alive and alive[w].state is WorkerState.RUNNING]
    broken = any(m is None or m.dead or m.state is WorkerState.BROKEN for m in members)
    if running and broken:
        return Abort(tuple(running))
    if running:
        return _while_running(view, alive)
    return _while_idle(view, alive)


def _while_running(view: View, alive: Mapping[str, WorkerView]) -> Decision:
    if view.stopping:
        return Pause("stop")
    newcomers = [
        w for w, v in alive.items() if w not in view.members and v.state is WorkerState.READY
    ]
    if newcomers and len(view.members) < view.max_workers:
        return Pause("grow")
    missing = view.max_workers - len(alive)
    if missing > 0 and view.startable > 0:
        return Start(min(missing, view.startable))
    return Wait()


def _while_idle(view: View, alive: Mapping[str, WorkerView]) -> Decision:
    idle = [w for w, v in alive.items() if v.idle]
    interrupted = any(view.workers[w].state is WorkerState.BROKEN for w in idle)
    if view.stopping and not (interrupted and len(idle) >= view.min_workers):
        # A generation that broke just now is formed once more, so that its state can be saved.
        return End(RunState.KILLED, "stopped on request")
    if view.members and not any(view.workers[w].joined for w in idle):
        # Everyone who held the state is gone.
        if len(alive) == 0 or not any(v.joined for v in alive.values()):
            return Restore()
    starting = len(alive) - len(idle)
    first = not view.members
    enough = len(idle) >= (view.max_workers if first and starting else view.min_workers)
    if enough and idle:
        return _form(view, idle)
    if len(alive) < view.max_workers and view.startable > 0:
        return Start(min(view.max_workers - len(alive), view.startable))
    late = view.waited_s > view.patience_s
    if len(idle) >= view.min_workers and idle and (late or not starting):
        return _form(view, idle)
    if late and not starting:
        return End(
            RunState.FAILED,
            f"only {len(idle)} of at least {view.min_workers} workers could be had for {view.patience_s:.0f} s",
        )
    return Wait()


def _form(view: View, idle: Sequence[str]) -> Form:
    """Rank 0 is the most advanced; earlier members keep their order, newcomers come last."""
    order = {w: i for i, w in enumerate(view.members)}
    by_rank = sorted(idle, key=lambda w: (
        not view.workers[w].joined,
        tuple(-p for p in view.workers[w].progress),
        order.get(w, len(order)), w,
    ))[: view.max_workers]  # fmt: skip
    source = view.workers[by_rank[0]]
    behind = tuple(
        rank for rank, w in enumerate(by_rank)
        if rank and (view.workers[w].progress < source.progress or not view.workers[w].joined)
    )  # fmt: skip
    return Form(tuple(by_rank), behind)


def deal_slots(slots: int, world_size: int) -> tuple[tuple[int, int], ...]:
    """Contiguous ranges of slots per rank, as even as can be.

    >>> deal_slots(4, 3)
    ((0, 1), (1, 2), (2, 4))
    """
    return tuple(
        (slots * r // world_size, slots * (r + 1) // world_size) for r in range(world_size)
    )
