"""The controller: owns one run. Poll, decide, act, until the run is over; then fetch what the workers still have."""

from collections.abc import Callable
from typing import Any

from descent.cluster.chaos.injector import Chaos
from descent.cluster.chaos.verdict import StrikeFile
from descent.cluster.clock import SYSTEM_CLOCK, Clock
from descent.cluster.control import policy
from descent.cluster.control.checkpoints import CheckpointCommitter
from descent.cluster.control.control_file import ControlFile
from descent.cluster.control.ending import Ending
from descent.cluster.control.health import WorkerHealth
from descent.cluster.control.intake import POLL_S, Intake
from descent.cluster.control.journal import Journal
from descent.cluster.control.outcome import Outcome
from descent.cluster.control.policy import View
from descent.cluster.control.run_state import ControllerState, RunState
from descent.cluster.control.scaling import Scaling
from descent.cluster.record.listener import Listener
from descent.cluster.record.run_log import RunLog
from descent.cluster.workers.group import WorkerGroup
from descent.config import RunConfig
from descent.config.schema import CLUSTER_KINDS
from descent.errors import CheckpointError, ClusterError, StoreError
from descent.messages import (
    TerminalState,
    WorkerState,
)
from descent.training.collectives import Store
from descent.training.plan import Plan

_CHAOS_POLL_S = 0.02
"""The same while faults are to be injected, whose moments depend on how far the run is."""
_PEER_S = 30.0
"""At most so long a lone survivor waits for a peer, where `Chaos.needs_peer`."""
_ABORT_S = 10.0
"""A member that was asked to leave its generation and hasn't after this time is ended: it is the one that is stuck."""
_NODES_EVERY_S = 1.0
"""Between two looks at the cluster for nodes that are going away."""


class Controller:
    """One run's state machine: `RunState` holds what is known, the pure `policy.decide` says what to do."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        group: WorkerGroup,
        store: Store,
        log: RunLog,
        committer: CheckpointCommitter,
        listener: Listener,
        *,
        first_step: int = 0,
        check_health: Callable[[], None] = lambda: None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """first_step: of the checkpoint that the run begins with. check_health: called in each turn; may raise."""
        self._config, self._plan, self._group, self._store = config, plan, group, store
        self._committer, self._clock, self._check_health = committer, clock, check_health
        self._first_step = first_step
        self._state = RunState(first_step=first_step, micro_size=plan.micro_size, now=clock.monotonic())
        self._health = WorkerHealth(config.regroup)
        control_file = ControlFile(log.run_dir, clock)
        self._journal = Journal(log, listener, control_file, plan.batch_size, clock)
        self._scaling = Scaling(plan, config.spares, group, control_file, self._journal.listener.note, clock)
        self._chaos = Chaos(
            config.chaos,
            plan.total_steps,
            first_step,
            killable=CLUSTER_KINDS if group.owns_cluster() else ("driver",),
            file=StrikeFile(log.run_dir),
            last_logged=log.last_step,
        )
        self._intake = Intake(config, self._state, group, self._journal, committer, self._chaos, clock)
        self._ending = Ending(
            self._state,
            group,
            self._journal,
            committer,
            self._intake,
            self._chaos,
            clock,
            send_memberships=self._send_memberships,
            batch_size=plan.batch_size,
            first_step=first_step,
        )
        self._nodes_looked_at = 0.0

    def stop(self) -> None:
        """Ask for a clean end at the end of the current step; safe in a signal handler."""
        self._state.request_stop()

    def finish_early(self, reason: str) -> None:
        """Ask for the end of the run, as finished, at the end of the current step; safe in any thread."""
        self._state.request_stop(reason)

    # -- the loop -------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train until the run is over. Never raises for a fault of a worker."""
        self.start()
        while True:
            decision = self.turn()
            if decision is not None:
                return self._end(decision)

    def note_lost_driver(self) -> None:
        """The run's process before this one died: what was committed since its last checkpoint is computed again."""
        logged = self._journal.log.last_step
        self._journal.incidents.open("driver lost", logged, detail="the process of the run ended without a word")
        self._journal.incidents.lost(max(0, logged - self._first_step))

    def start(self) -> None:
        """Start the first workers, unless that has been done."""
        if not self._group.workers:
            self._scaling.start(self._scaling.high + self._scaling.spares)

    def turn(self) -> policy.End | None:
        """Poll, decide and act once; the decision to end the run, where that is what comes next."""
        self._intake.poll(self._intake.reporter, _CHAOS_POLL_S if self._config.chaos.faults else POLL_S)
        self._journal.log.flush()
        self._check_health()
        self._check_cluster()
        self._check_workers()
        self._request_due_checkpoint()
        self._scaling.answer_requests(len(self._state.generation.members))
        self._intake.take_checkpoint_results()
        if self._state.fatal_error:
            return policy.End(TerminalState.FAILED, self._state.fatal_error)
        # A checkpoint that was to be written before the run ends, or goes on elsewhere, is waited for.
        if not (self._state.generation.save_only and self._committer.committing):
            decision = policy.decide(self._view())
            if isinstance(decision, policy.End):
                return decision
            self._act(decision)
        self._inject_faults()
        self._show("RUNNING")
        self._journal.listener.tick()
        return None

    # -- workers that hang, die or go ---------------------------------------------------------------

    def _check_workers(self) -> None:
        """End workers that hang, note which are dead, and which will go away soon."""
        group = self._group
        for worker_id, worker in group.workers.items():
            if worker.dead:
                continue
            is_member = worker_id in self._state.generation.members
            if why := self._health.not_started(worker, group.since_answer_s(worker_id)):
                self._release(worker_id, why)
            elif why := self._health.hangs(worker, group.unanswered_s(worker_id), is_member=is_member):
                group.kill(worker_id, why)
        for worker_id, worker in group.workers.items():
            if worker.dead and self._state.worker_lost(worker):
                is_member = worker_id in self._state.generation.members
                since_s = group.since_answer_s(worker_id) if is_member else None
                self._journal.add_loss(worker, self._state.committed, since_s)
        now = self._clock.monotonic()
        if now - self._nodes_looked_at > _NODES_EVERY_S:
            self._nodes_looked_at = now
            draining = group.draining_nodes()
            for worker_id, worker in group.workers.items():
                if not worker.dead and worker.status is not None and worker.status.node in draining:
                    self._intake.let_leave(worker_id, "its node is being drained")

    def _check_cluster(self) -> None:
        """A cluster that is gone: whoever still trains is asked for a checkpoint to go on from."""
        failure, owned = self._group.cluster_failure(), self._group.owns_cluster()
        if failure is None and not owned and self._state.cluster_is_back():
            self._journal.listener.note("the cluster's head answers again")
        if failure is None or not self._state.cluster_lost(self._clock.monotonic(), restartable=owned):
            return
        self._chaos.cluster_lost()
        if owned:
            self._journal.incidents.open("cluster lost", self._state.committed, detail=failure)
        else:  # those of its workers that can be reached train on
            self._journal.incidents.add("cluster lost", self._state.committed, detail=failure)
        reporter = self._intake.reporter
        if reporter is not None:
            self._group.request_checkpoint(reporter)

    def _restart_cluster(self) -> None:
        self._journal.listener.note("starting the private cluster again")
        try:
            self._group.restart_cluster()
        except ClusterError as error:
            self._state.fail(str(error))
            return
        for worker_id in self._group.workers:
            self._state.worker_released(worker_id)
        self._state.cluster_is_back()
        self._scaling.start(self._scaling.high + self._scaling.spares)

    def _release(self, worker_id: str, why: str) -> None:
        self._state.worker_released(worker_id)
        self._group.release(worker_id, why)

    # -- decide ---------------------------------------------------------------------------------

    def _view(self) -> View:
        now, state = self._clock.monotonic(), self._state
        workers = {
            worker_id: state.view(worker, stalled=self._health.stalled(worker.status))
            for worker_id, worker in self._group.workers.items()
        }
        members = state.generation.members
        if not any(workers[w].state is WorkerState.RUNNING and not workers[w].dead for w in members):
            state.members_stopped(now)
        lost_s, lost_at_step = state.cluster_lost_since(now)
        waiting = state.state in (ControllerState.STARTING, ControllerState.REGROUPING)
        regroup = self._config.regroup
        return View(
            workers=workers,
            members=members,
            generation=state.generation.number,
            min_workers=self._least_workers(state.in_state_s(now) if waiting else 0.0),
            max_workers=self._scaling.high,
            failures=state.failures,
            max_failures=regroup.max_failures + self._chaos.allowance,
            stopping=state.stop_requested,
            stop_reason=state.stop_reason,
            waited_s=state.in_state_s(now) if waiting else 0.0,
            patience_s=regroup.wait_s,
            startable=self._scaling.startable(workers),
            spares=self._scaling.spares,
            saved_step=self._committer.step,
            save_tried=state.generation.save_only,
            earlier=state.raised,
            cluster_lost_s=lost_s,
            cluster_lost_at_step=lost_at_step,
            restartable=self._group.owns_cluster(),
        )

    def _least_workers(self, waited_s: float) -> int:
        low, high = self._scaling.low, self._scaling.high
        wait_for_peer = waited_s < _PEER_S and self._chaos.needs_peer(self._state.committed)
        return max(low, min(2, high)) if wait_for_peer else low

    # -- act --------------------------------------------------------------------------------------

    def _act(self, decision: policy.Decision) -> None:
        if isinstance(decision, policy.Abort):
            self._abort(decision.workers)
        elif isinstance(decision, policy.Pause):
            self._pause()
        elif isinstance(decision, policy.Form):
            self._form(decision)
        elif isinstance(decision, policy.Start):
            self._scaling.start(decision.count)
        elif isinstance(decision, policy.Retire):
            for worker_id in decision.workers:
                self._retire(worker_id)
        elif isinstance(decision, policy.Restore):
            self._restore()
        elif isinstance(decision, policy.RestartCluster):
            self._restart_cluster()

    def _pause(self) -> None:
        # Members that were asked to leave at once, or to pause, stop anyway.
        if self._state.state in (ControllerState.TRAINING, ControllerState.SAVING):
            self._state.pause_requested(self._clock.monotonic())
            for worker_id in self._state.generation.members:
                self._group.request_pause(worker_id)

    def _abort(self, workers: tuple[str, ...]) -> None:
        state, now = self._state, self._clock.monotonic()
        if state.state is not ControllerState.ABORTING:
            state.abort_requested(now)
            standstill = self._health.standstill([self._group.workers[w] for w in workers])
            if standstill:
                state.generation_broke("standstill", standstill, int(self._clock.time() * 1000))
            for worker_id in workers:
                self._group.abort(worker_id, state.generation.number)
        elif state.in_state_s(now) > _ABORT_S:
            for worker_id in workers:
                status = self._group.workers[worker_id].status
                stuck = f", stuck in '{status.phase}'" if status is not None else ""
                self._group.kill(worker_id, f"could not be brought to leave its generation{stuck}")

    def _retire(self, worker_id: str) -> None:
        """End a worker that isn't needed, or that alone raised an exception."""
        status = self._group.workers[worker_id].status
        failure = status.failure if status is not None else None
        if failure is None:
            self._release(worker_id, "no longer needed")
            return
        # No other worker has raised it, and it was raised for the first time: perhaps the machine is at fault.
        self._state.worker_raised(failure)
        self._group.kill(worker_id, f"{failure.kind}: {failure.message}"[:300])

    def _form(self, form: policy.Form) -> None:
        state = self._state
        if not state.begin_regroup(form.workers):
            # One of them can't be reached by the others, and nobody knows which: one leaves and the others
            # try. At the latest the last one goes on alone, and the run grows again from there.
            self._intake.let_leave(form.workers[0], "the members could not connect")
            return
        self._journal.add_breakage(state.breakage, state.committed)
        source = self._committer.newest if form.restore else None
        state.form(form, self._group.workers, self._committer.step, self._clock.monotonic())
        self._send_memberships(behind=form.behind, restore_from=source)
        self._committer.drop_incomplete()
        self._journal.generation_formed(state.generation, state.committed)

    def _send_memberships(self, **given: Any) -> None:
        for worker_id, membership in self._state.memberships(self._plan, self._store, **given).items():
            self._group.join(worker_id, membership)

    def _restore(self) -> None:
        """No worker holds the state: the run goes on from its newest checkpoint, or from its start."""
        state, committer = self._state, self._committer
        state.lose_state(self._group.workers.values())
        try:
            skipped = committer.return_to_newest()
        except (CheckpointError, StoreError) as error:  # the run must not begin again in silence
            state.fail(str(error))
            return
        for reason in skipped:
            self._journal.listener.note(f"skipped checkpoint: {reason}")
        source = committer.newest
        self._journal.state_lost(state.committed, source.name if source else None, committer.step)
        self._chaos.steps_lost(state.committed - max(committer.step, 0))
        if source is None:
            # A replica that has taken steps can't go back to the initial state.
            for worker_id, worker in self._group.workers.items():
                if not worker.dead and worker.status is not None and worker.status.step > 0:
                    self._retire(worker_id)

    def _inject_faults(self) -> None:
        """Inject the faults that chaos has in store for this moment."""
        workers, generation = self._group.workers, self._state.generation
        undisturbed = (
            self._state.state is ControllerState.TRAINING
            and not self._journal.incidents.recovering
            and all(
                not (w := workers[m]).dead
                and w.status is not None
                and (w.status.state, w.status.generation) == (WorkerState.RUNNING, generation.number)
                for m in generation.members
            )
        )
        dead = {worker_id for worker_id, worker in workers.items() if worker.dead}
        for worker_id, fault in self._chaos.due_faults(
            self._clock.time(), generation.members, dead, generation.number, self._state.committed, undisturbed
        ):
            if fault.phase == "save":
                self._group.request_checkpoint(worker_id or generation.members[0])
            if worker_id:
                self._group.inject(worker_id, fault)
            else:
                self._group.kill_process(fault.kind, fault.delay_s)

    def _request_due_checkpoint(self) -> None:
        now, reporter = self._clock.monotonic(), self._intake.reporter
        if reporter is None or self._committer.unfinished or not self._committer.cadence.due(now):
            return
        self._committer.cadence.requested(now)
        self._group.request_checkpoint(reporter)

    def _show(self, run_state: str) -> None:
        bounds = {"min": self._scaling.low, "max": self._scaling.high}
        total_steps = self._plan.total_steps
        checkpoint = self._committer.step if self._committer.newest is not None else None
        more: dict[str, Any] = {"total_steps": total_steps, "workers": bounds, "checkpoint": checkpoint}
        self._journal.show(run_state, self._state, self._group.workers, **more)

    def _end(self, decision: policy.End) -> Outcome:
        outcome = self._ending.finish(decision)
        self._show(str(outcome.state))
        return outcome
