"""What the controller does next: pure functions from a `View` of the run to one decision. No Ray, no clock, no state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from descent.messages import TerminalState, WorkerState

ALIVE_IDLE = (WorkerState.READY, WorkerState.PAUSED, WorkerState.BROKEN, WorkerState.FINISHED)
Failure = tuple[str, int]
"""(the exception's class, the step that was being computed when it was raised)."""


@dataclass(frozen=True)
class WorkerView:
    """One worker as the controller sees it."""

    state: WorkerState
    dead: bool = False
    generation: int = -1
    progress: tuple[int, int] = (0, -1)
    """(last committed step, last evaluated step)."""
    holds_state: bool = False
    """Whether the worker has the run's state, of whatever step: as a member of a generation that began with it, or
    received by broadcast or from a checkpoint since."""
    leaving: bool = False
    """Whether its process or node will go away soon, which was announced: not a fault."""
    slow: bool = False
    """Whether the worker is a straggler that is to be replaced."""
    stalled: bool = False
    """Whether the worker has made no progress for too long: it is stuck, or waits for a member that is."""
    failure: Failure | None = None
    """The exception, where the state is FAILED."""

    @property
    def idle(self) -> bool:
        """Whether the worker can become a member of a generation now."""
        return not self.dead and self.state in ALIVE_IDLE

    @property
    def staying(self) -> bool:
        """Whether the run counts on the worker from now on."""
        return not (self.dead or self.leaving or self.slow)


@dataclass(frozen=True)
class View:
    """Everything that a decision depends on."""

    workers: Mapping[str, WorkerView]
    members: tuple[str, ...]
    """The ids of the current generation's members, by rank; empty before the first and when the state was lost."""
    generation: int
    min_workers: int
    max_workers: int
    failures: int = 0
    max_failures: int = 8
    stopping: bool = False
    stop_reason: str = ""
    """Why a run that is stopping counts as finished; empty where it doesn't."""
    waited_s: float = 0.0
    """Seconds for which no member has been running; 0 while one is."""
    patience_s: float = 60.0
    startable: int = 0
    """How many more workers the cluster could start now."""
    spares: int = 0
    saved_step: int = -1
    """The step of the newest checkpoint; -1 if there is none."""
    save_tried: bool = False
    """Whether the current generation was formed only to write a checkpoint."""
    earlier: frozenset[Failure] = frozenset()
    """The exceptions of workers that were replaced."""
    cluster_lost_s: float | None = None
    """Seconds since the cluster was found to be gone; None while it is there."""
    cluster_lost_at_step: int = 0
    """The last step that was committed by then."""
    restartable: bool = True
    """Whether the cluster is the run's own, which can be started again."""


@dataclass(frozen=True)
class Wait:
    """Do nothing until a worker answers or time has passed."""


@dataclass(frozen=True)
class Abort:
    """Ask these members to leave their generation at once, since a peer of theirs is gone or stuck.

    A member that waits for others leaves and keeps its state; a member that is stuck doesn't leave.
    """

    workers: tuple[str, ...]


@dataclass(frozen=True)
class Pause:
    """Let the members stop together at the end of the step."""

    reason: str


@dataclass(frozen=True)
class Form:
    """Form the next generation of these workers, by rank; the ranks in `behind` receive rank 0's state."""

    workers: tuple[str, ...]
    behind: tuple[int, ...]
    save_only: bool = False
    """Whether its members only write a checkpoint."""
    restore: bool = False
    """Whether all begin with the newest checkpoint, of which each reads a share."""


@dataclass(frozen=True)
class Start:
    """Start this many workers."""

    count: int


@dataclass(frozen=True)
class Retire:
    """End these workers: they aren't needed, or their code raised an exception."""

    workers: tuple[str, ...]


@dataclass(frozen=True)
class Restore:
    """No worker holds the state any more: the next generation begins with the newest checkpoint."""


@dataclass(frozen=True)
class RestartCluster:
    """Start the private cluster again: it is gone, with all workers that it had."""


@dataclass(frozen=True)
class End:
    """The run is over."""

    state: TerminalState
    reason: str = ""


Decision = Wait | Abort | Pause | Form | Start | Retire | Restore | RestartCluster | End
_CLUSTER_GRACE_S = 10.0
"""How long workers that outlive their cluster may take for a checkpoint."""
_HEAD_PATIENCE_S = 30.0
"""How long the head of a cluster that isn't the run's own may be gone: after 60 s Ray ends all processes that use it."""


def decide(view: View) -> Decision:
    """The next decision; the same view gives the same decision."""
    if view.restartable or view.cluster_lost_s is None or view.cluster_lost_s < _HEAD_PATIENCE_S or view.stopping:
        return _decide(view)
    decision = _decide(replace(view, stopping=True))  # those that still train stop with a checkpoint
    if isinstance(decision, End) and decision.state is TerminalState.KILLED:
        return End(
            TerminalState.FAILED,
            f"the cluster's head (Ray's GCS) has not answered for {_HEAD_PATIENCE_S:.0f} s; "
            "when the cluster is there again, resume goes on from the checkpoint",
        )
    return decision


def _decide(view: View) -> Decision:
    alive = {w: v for w, v in view.workers.items() if not v.dead}
    if view.failures > view.max_failures:
        return End(
            TerminalState.FAILED,
            f"{view.failures} failures, regroup.max_failures={view.max_failures}",
        )
    members = [view.workers.get(w) for w in view.members]
    if members and all(m is not None and not m.dead and m.state is WorkerState.FINISHED for m in members):
        return End(TerminalState.FINISHED)
    if view.cluster_lost_s is not None and view.restartable and not view.stopping:
        return _without_cluster(view, alive)
    running = [w for w in view.members if w in alive and alive[w].state is WorkerState.RUNNING]
    broken = any(
        m is None or m.dead or m.stalled or m.state in (WorkerState.BROKEN, WorkerState.FAILED) for m in members
    )
    if running and broken:
        return Abort(tuple(running))
    if running:
        return _while_running(view, alive)
    if _users_error(view, alive):
        return End(TerminalState.FAILED, "a worker's code failed")
    return _while_idle(view, alive)


def _without_cluster(view: View, alive: Mapping[str, WorkerView]) -> Decision:
    """Workers that still train have a moment for the checkpoint that the run then goes on from."""
    assert view.cluster_lost_s is not None
    running = any(w in alive and alive[w].state is WorkerState.RUNNING for w in view.members)
    if running and view.cluster_lost_s < _CLUSTER_GRACE_S and view.saved_step < view.cluster_lost_at_step:
        return Wait()
    return RestartCluster()


def _users_error(view: View, alive: Mapping[str, WorkerView]) -> bool:
    """Whether an exception comes from the user's code and not from one machine: a retry would raise it again.

    So it is when a worker can't be built at the start, when all members raise the same one, or when it is
    raised a second time at the same step.
    """
    raised = [v.failure for v in alive.values() if v.failure is not None]
    if not raised:
        return False
    members = [alive[w].failure for w in view.members if w in alive]
    return (
        not view.members
        or (None not in members and len(set(members)) == 1)
        or any(failure in view.earlier for failure in raised)
    )


def _while_running(view: View, alive: Mapping[str, WorkerView]) -> Decision:
    if view.stopping:
        return Pause("stop")
    outside = {w: v for w, v in alive.items() if w not in view.members}
    useless = [w for w, v in outside.items() if not v.staying or v.state is WorkerState.FAILED]
    if useless:
        return Retire(tuple(useless))
    ready = [w for w, v in outside.items() if v.idle]
    leaving = [w for w in view.members if alive[w].leaving]
    slow = [w for w in view.members if alive[w].slow and not alive[w].leaving]
    good = len(view.members) - len(leaving) - len(slow)
    if good + len(slow) > view.max_workers:
        return Pause("shrink")
    if leaving and good + len(slow) + len(ready) >= view.min_workers:
        return Pause("drain")
    if slow and good + len(ready) >= min(view.max_workers, len(view.members)):
        return Pause("replace")
    if ready and good + len(slow) < view.max_workers:
        return Pause("grow")
    if len(ready) > view.spares and good == view.max_workers:
        return Retire(tuple(ready[view.spares :]))
    return _start_more(view, alive) or Wait()


def _start_more(view: View, alive: Mapping[str, WorkerView]) -> Start | None:
    staying = sum(v.staying for v in alive.values())
    missing = min(view.max_workers + view.spares - staying, view.startable)
    return Start(missing) if missing > 0 else None


def _while_idle(view: View, alive: Mapping[str, WorkerView]) -> Decision:
    failed = tuple(w for w, v in alive.items() if v.state is WorkerState.FAILED)
    if failed:
        return Retire(failed)
    idle = {w: v for w, v in alive.items() if v.idle}
    holders = [w for w, v in idle.items() if v.holds_state]
    best = max(holders, key=lambda w: (idle[w].progress, w), default="")
    unsaved = bool(holders) and idle[best].progress[0] > view.saved_step
    if view.stopping:
        interrupted = any(v.state is WorkerState.BROKEN for v in idle.values())
        if interrupted and unsaved and not view.save_tried:
            return Form((best,), (), save_only=True)
        if view.stop_reason and holders:
            return End(TerminalState.FINISHED, view.stop_reason)
        return End(TerminalState.KILLED, "stopped on request")
    if view.members and not any(v.holds_state for v in alive.values()):
        return Restore()  # all workers that held the state are gone
    chosen = [w for w, v in idle.items() if v.staying]
    if holders and not any(idle[w].holds_state for w in chosen):
        # Only workers that will go away hold the state: the others get it through a checkpoint.
        if chosen and not unsaved:
            return _form(view, chosen)
        if chosen and not view.save_tried:
            return Form((best,), (), save_only=True)
        chosen += holders
    elif holders and idle[best].progress > max(idle[w].progress for w in chosen if idle[w].holds_state):
        chosen = [best, *(w for w in chosen if w != best)]  # it alone has committed the last step
    if len(chosen) < view.min_workers:
        chosen = list(idle)  # also those that will go away, as long as they are there
    starting = len(alive) - len(idle)
    first = view.generation == 0
    late = view.waited_s > view.patience_s
    enough = len(chosen) >= (view.max_workers if first and starting else view.min_workers)
    if chosen and (enough or (len(chosen) >= view.min_workers and (late or not starting))):
        return _form(view, chosen)
    start = _start_more(view, alive)
    if start is not None:
        return start
    if view.save_tried or (late and not starting):
        if unsaved and not view.save_tried:
            return Form((best,), (), save_only=True)
        return End(
            TerminalState.FAILED,
            f"only {len(chosen)} of at least {view.min_workers} workers could be had for {view.patience_s:.0f} s",
        )
    return Wait()


def _form(view: View, chosen: Sequence[str]) -> Form:
    """Rank 0 is the most advanced holder of the state; earlier members keep their order, newcomers come last."""
    order = {w: i for i, w in enumerate(view.members)}
    by_rank = sorted(
        chosen,
        key=lambda w: (
            not view.workers[w].holds_state,
            tuple(-p for p in view.workers[w].progress),
            order.get(w, len(order)),
            w,
        ),
    )[: view.max_workers]
    source = view.workers[by_rank[0]]
    behind = tuple(
        rank
        for rank, w in enumerate(by_rank)
        if rank and (view.workers[w].progress < source.progress or not view.workers[w].holds_state)
    )
    return Form(tuple(by_rank), behind, restore=not source.holds_state and view.saved_step >= 0)
