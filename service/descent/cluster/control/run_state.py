"""What the controller knows of its run: one class that alone changes it.

Every attribute holds an immutable value that is replaced as a whole, so a copy of the attributes is a
snapshot of the state. No Ray, no clock, no files: times come in as arguments.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from descent.cluster.control.policy import Failure, Form, WorkerView
from descent.cluster.workers.group import WorkerInfo
from descent.messages import Membership, WorkerFailure, WorkerState, WorkerStatus
from descent.storage import Location
from descent.training.collectives import Store
from descent.training.plan import Plan
from descent.training.slot_balancer import assign_slots

_PHASES_WITHOUT_STATE = ("running", "restore", "join", "receive")
"""Phases of a generation in which a member that is to receive the state may not have it yet."""


class ControllerState(StrEnum):
    """What the controller is doing; shown in the run's status file."""

    STARTING = "starting"  # the first generation is not formed yet
    TRAINING = "training"  # a generation connects, receives the state where needed, and takes steps
    PAUSING = "pausing"  # its members were asked to stop at the end of the step
    ABORTING = "aborting"  # a member is lost or stuck: the others were asked to leave at once
    SAVING = "saving"  # a generation of one worker that only writes a checkpoint
    REGROUPING = "regrouping"  # no member is running: the next generation waits for enough workers
    ENDING = "ending"  # the last records and shares of a checkpoint are fetched
    ENDED = "ended"


_S = ControllerState
_NEXT = {
    _S.STARTING: {_S.TRAINING, _S.ENDING},
    _S.TRAINING: {_S.PAUSING, _S.ABORTING, _S.REGROUPING, _S.ENDING},
    _S.PAUSING: {_S.ABORTING, _S.REGROUPING, _S.ENDING},
    _S.ABORTING: {_S.REGROUPING, _S.ENDING},
    _S.SAVING: {_S.PAUSING, _S.ABORTING, _S.REGROUPING, _S.ENDING},
    _S.REGROUPING: {_S.TRAINING, _S.SAVING, _S.ENDING},
    _S.ENDING: {_S.ENDED},
    _S.ENDED: set[ControllerState](),
}


@dataclass(frozen=True)
class Generation:
    """One membership of the process group, as the controller has formed it."""

    number: int = 0
    """0 before the first."""
    members: tuple[str, ...] = ()
    """Worker ids, by rank."""
    save_only: bool = False
    """Whether it was formed only to write a checkpoint."""


@dataclass(frozen=True)
class Breakage:
    """Why a generation can't go on though no member is known to be dead."""

    kind: str
    time_ms: int
    """Unix time of its detection, in milliseconds."""
    detail: str


class RunState:
    """A run as the controller knows it, from its start to its end."""

    def __init__(self, *, first_step: int, micro_size: int, now: float) -> None:
        self.state = ControllerState.STARTING
        self.entered_at = now
        """Monotonic time at which `state` was entered."""
        self.stop_requested = False
        self.stop_reason = ""
        """Why the run is to end as finished before its last step; empty where a person or a signal ends it."""
        self.generation = Generation()
        self.committed = first_step
        """The last step that a worker is known to have committed."""
        self.micro_size = micro_size
        """Samples in one forward and backward; halved where they don't fit into memory."""
        self.breakage: Breakage | None = None
        """Why the current generation broke; None while it hasn't, or where a member's death is the reason."""
        self.leaving: frozenset[str] = frozenset()
        """Workers whose process or node will go away soon."""
        self.slow: frozenset[str] = frozenset()
        """Stragglers that are to be replaced."""
        self.raised: frozenset[Failure] = frozenset()
        """What workers that were replaced had raised."""
        self.last_failure: WorkerFailure | None = None
        """The last exception of a worker that was replaced."""
        self.checkpoint_failed = False
        """Whether the last checkpoint could not be written."""
        self.fatal_error = ""
        """Why the run can't go on, or must not."""
        self._holders: frozenset[str] = frozenset()
        self._awaited: Mapping[str, int] = {}
        """Members that don't hold the state yet, and the step that they will have when they do."""
        self._awaited_with_step: frozenset[str] = frozenset()
        """Those of them that have that step already, but not its bits: their replica differed."""
        self._losses_handled: frozenset[str] = frozenset()
        self._cluster_lost: tuple[float, int] | None = None
        """(monotonic time, last committed step) when the cluster was found to be gone; None while it is there."""
        self._restartable = True
        """Whether the cluster that is gone is the run's own."""
        self._crashes = 0
        self._futile_regroups = self._futile_in_a_row = 0
        self._formed_at: tuple[int, int] | None = None
        """(committed, micro_size) when the last generation was formed."""
        self._halved_in = -1
        """The generation in which the micro-batch was last halved."""

    # -- the controller's state -----------------------------------------------------------

    def _enter(self, state: ControllerState, now: float) -> None:
        assert state in _NEXT[self.state], (self.state, state)
        self.state, self.entered_at = state, now

    def in_state_s(self, now: float) -> float:
        """Seconds since the current state was entered."""
        return now - self.entered_at

    def request_stop(self, reason: str = "") -> None:
        """The run is to end at the end of the current step: a person wants it, or what the reason says."""
        if not self.stop_requested or not reason:  # the first reason counts, and a person's wish more than any
            self.stop_reason = reason
        self.stop_requested = True

    def pause_requested(self, now: float) -> None:
        """All members were asked to stop at the end of the step."""
        self._enter(ControllerState.PAUSING, now)

    def abort_requested(self, now: float) -> None:
        """The members that still run were asked to leave their generation."""
        self._enter(ControllerState.ABORTING, now)

    def members_stopped(self, now: float) -> None:
        """No member of the generation is running any more."""
        if self.state not in (ControllerState.STARTING, ControllerState.REGROUPING):
            self._enter(ControllerState.REGROUPING, now)

    def end_begun(self, now: float) -> None:
        """Nothing more is trained."""
        self._enter(ControllerState.ENDING, now)

    def ended(self, now: float) -> None:
        """All that the workers still had is fetched."""
        self._enter(ControllerState.ENDED, now)

    # -- what workers report ----------------------------------------------------------------

    def receive(self, status: WorkerStatus, now_ms: int) -> None:
        """Take in a worker's answer to a poll."""
        self.committed = max(self.committed, status.step)
        if status.generation != self.generation.number:
            return
        self._note_received_state(status)
        if status.state is WorkerState.BROKEN:
            kind = "out of memory" if status.out_of_memory else "connection lost"
            detail = f"{status.worker_id}, {status.broken_by}" if status.broken_by else ""
            self.generation_broke(kind, detail, now_ms)
        if status.diverged:
            # The state of these isn't the majority's: they must receive it anew.
            self._holders -= {self.generation.members[rank] for rank in status.diverged}
        if status.out_of_memory:
            self._halve_micro_size()

    def _note_received_state(self, status: WorkerStatus) -> None:
        """A newcomer holds the state when its status shows the step that it was to receive, not before.

        The source may die while it sends; then a newcomer that counts as a holder would go on from nothing.
        """
        worker = status.worker_id
        step = self._awaited.get(worker)
        if step is None or status.step < step:
            return
        before_receiving = status.phase in _PHASES_WITHOUT_STATE or status.state is WorkerState.BROKEN
        if not (before_receiving and worker in self._awaited_with_step):
            self._holders |= {worker}
            self._awaited = {w: s for w, s in self._awaited.items() if w != worker}

    def _halve_micro_size(self) -> None:
        """A micro-batch didn't fit into memory: once a generation, however many workers report it."""
        if self.generation.number != self._halved_in and self.micro_size > 1:
            self._halved_in = self.generation.number
            self.micro_size //= 2

    def generation_broke(self, kind: str, detail: str, now_ms: int) -> None:
        """Keep the first sign that the generation can't go on; it becomes an incident at the regroup."""
        self.breakage = self.breakage or Breakage(kind, now_ms, detail)

    # -- workers that go, fail or are slow ----------------------------------------------------

    def start_leaving(self, worker_id: str) -> bool:
        """Note that a worker will go away soon; False if that was known."""
        known = worker_id in self.leaving
        self.leaving |= {worker_id}
        return not known

    def mark_slow(self, worker_id: str) -> None:
        """A straggler is to be replaced."""
        self.slow |= {worker_id}

    def worker_lost(self, worker: WorkerInfo) -> bool:
        """Count a worker's death once, if it is a crash; False if it was counted, or went with its cluster."""
        known = worker.worker_id in self._losses_handled
        self._losses_handled |= {worker.worker_id}
        if known or (self._cluster_lost is not None and self._restartable):
            return False
        self._crashes += not (worker.excused or worker.worker_id in self.leaving)
        return True

    def worker_released(self, worker_id: str) -> None:
        """A worker that isn't needed was ended: no loss."""
        self._losses_handled |= {worker_id}

    def worker_raised(self, failure: WorkerFailure) -> None:
        """A worker is replaced because of this exception; where another raises the same one, the code is at fault."""
        self.raised |= {(failure.kind, failure.step + 1)}
        self.last_failure = failure

    @property
    def failures(self) -> int:
        """Crashes, and regroups that led to no step: what `regroup.max_failures` bounds."""
        return self._crashes + self._futile_regroups

    def cluster_lost(self, now: float, *, restartable: bool) -> bool:
        """Note that the cluster is gone, a crash where it is the run's own; False if that was known."""
        if self._cluster_lost is not None:
            return False
        self._cluster_lost, self._restartable = (now, self.committed), restartable
        self._crashes += restartable
        return True

    def cluster_is_back(self) -> bool:
        """The cluster runs again, the run's own one without workers; False if it was there all the time."""
        was_lost = self._cluster_lost is not None
        self._cluster_lost = None
        return was_lost

    def cluster_lost_since(self, now: float) -> tuple[float | None, int]:
        """(seconds since the cluster was lost, the last step committed by then); (None, 0) while it is there."""
        if self._cluster_lost is None:
            return None, 0
        at, step = self._cluster_lost
        return now - at, step

    def fail(self, reason: str) -> None:
        """The run can't go on."""
        self.fatal_error = reason

    # -- generations ----------------------------------------------------------------------------

    def begin_regroup(self, workers: tuple[str, ...]) -> bool:
        """Whether these workers may form a generation; False if the same ones have failed to connect twice.

        Regroups that lead to no step must come to an end: a network that always fails, an error in the
        user's code that looks like a lost peer. A regroup after a loss isn't counted: the loss was.
        """
        here = (self.committed, self.micro_size)
        if here == self._formed_at and set(workers) == set(self.generation.members):
            self._futile_regroups += 1
            self._futile_in_a_row += 1
            if self._futile_in_a_row >= 2 and len(workers) > 1:
                self._futile_in_a_row = 0
                return False
        else:
            self._futile_in_a_row = 0
        self._formed_at = here
        return True

    def form(self, form: Form, workers: Mapping[str, WorkerInfo], checkpoint_step: int, now: float) -> Generation:
        """Make these workers the current generation, and note which of them have yet to receive the state.

        checkpoint_step: of the checkpoint that all begin with, where `form.restore`.
        """
        source = workers[form.workers[0]].status
        step = checkpoint_step if form.restore else source.step if source else 0
        # Nobody holds a checkpoint's state until all members have exchanged the shares that they have read.
        # Before the first step all hold the same state, which the seed decides.
        ranks = range(len(form.workers)) if form.restore else form.behind
        awaited = {form.workers[rank] for rank in ranks} if step > 0 else set()
        self._holders |= set(form.workers) - awaited
        self._awaited = dict.fromkeys(sorted(awaited - self._holders), step)
        self._awaited_with_step = frozenset(
            w for w in self._awaited if (status := workers[w].status) is not None and status.step >= step
        )
        self.generation = Generation(self.generation.number + 1, form.workers, form.save_only)
        self.breakage = None
        self._enter(ControllerState.SAVING if form.save_only else ControllerState.TRAINING, now)
        return self.generation

    def memberships(
        self,
        plan: Plan,
        store: Store,
        *,
        behind: tuple[int, ...] = (),
        restore_from: Location | None = None,
        save_to: Location | None = None,
    ) -> dict[str, Membership]:
        """The places in the current generation, by worker id. See `Membership` for the arguments."""
        generation = self.generation
        world_size = len(generation.members)
        return {
            worker_id: Membership(
                generation=generation.number,
                rank=rank,
                world_size=world_size,
                store_host=store.host,
                store_port=store.port,
                slots=assign_slots(plan.slots, world_size),
                micro_size=self.micro_size,
                behind=behind,
                restore_from=None if restore_from is None else str(restore_from),
                save_only=generation.save_only,
                save_to=None if save_to is None else str(save_to),
            )
            for rank, worker_id in enumerate(generation.members)
        }

    def form_rescue(self, worker_id: str) -> Generation:
        """At the run's end: a generation of one that writes the last state into the run's own folder."""
        self.generation = Generation(self.generation.number + 1, (worker_id,), save_only=True)
        return self.generation

    def lose_state(self, workers: Iterable[WorkerInfo]) -> None:
        """No worker holds the state any more; the run goes on from a checkpoint, or from its start.

        The generation's number is taken: a member that is still alive somewhere can't join a later one.
        """
        members = [w for w in workers if w.worker_id in self.generation.members]
        if self._formed_at == (self.committed, self.micro_size):
            # A checkpoint that verifies here and can't be read by the members, again and again, is an end.
            self._futile_regroups += all(not member.dead for member in members)
        self._holders, self._awaited = frozenset(), {}
        self.generation = Generation(self.generation.number + 1)

    # -- checkpoints ------------------------------------------------------------------------------

    def checkpoint_ended(self, error: str | None, *, required: bool) -> None:
        """A checkpoint was committed, or failed; a required one that failed is the run's end."""
        self.checkpoint_failed = error is not None
        if error is not None and required:
            self.fatal_error = f"checkpoint.required=true: {error}"

    # -- questions --------------------------------------------------------------------------------

    def holds_state(self, worker_id: str) -> bool:
        """Whether the worker has the run's state, of whatever step."""
        return worker_id in self._holders

    def view(self, worker: WorkerInfo, *, stalled: bool) -> WorkerView:
        """The worker as the policy sees it."""
        status, worker_id = worker.status, worker.worker_id
        leaving, holds_state = worker_id in self.leaving, worker_id in self._holders
        if status is None:
            return WorkerView(WorkerState.STARTING, worker.dead, holds_state=holds_state, leaving=leaving)
        state = status.state
        joining = worker_id in self.generation.members and status.generation < self.generation.number
        if joining and state is not WorkerState.FAILED:
            state = WorkerState.RUNNING  # its membership was sent; its last status is of an older generation
        failure = status.failure
        return WorkerView(
            state,
            worker.dead,
            status.generation,
            (status.step, status.evaluated),
            holds_state,
            leaving,
            worker_id in self.slow,
            stalled,
            (failure.kind, failure.step + 1) if failure is not None else None,
        )
