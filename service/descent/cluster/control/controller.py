"""The controller: owns one run. Poll, decide, act, until the run is over."""

import time
from collections.abc import Callable

from descent.cluster.chaos.injector import Chaos
from descent.cluster.control import policy
from descent.cluster.control.checkpoints import CheckpointCommitter
from descent.cluster.control.control_file import ControlFile
from descent.cluster.control.ending import SAVE_S, Ending, Outcome
from descent.cluster.control.generation import Generation, StateHolders
from descent.cluster.control.health import WorkerHealth
from descent.cluster.control.policy import View
from descent.cluster.control.reports import POLL_S, Reports
from descent.cluster.control.scaling import Scaling
from descent.cluster.record.incidents import IncidentLog
from descent.cluster.record.listener import Listener
from descent.cluster.record.run_log import RunLog
from descent.cluster.workers.group import WorkerGroup
from descent.config import RunConfig
from descent.messages import Membership, TerminalState, WorkerState
from descent.training.collectives import Store
from descent.training.plan import Plan
from descent.training.slot_balancer import assign_slots

_ABORT_S = 10.0
"""A member that is told to leave its generation and doesn't within this time is replaced."""


class Controller:
    """One run's state machine around the pure `policy.decide`."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        group: WorkerGroup,
        store: Store,
        log: RunLog,
        commits: CheckpointCommitter,
        listener: Listener,
        *,
        first_step: int = 0,
        check_health: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._plan, self._group, self._store = config, plan, group, store
        self._log, self._listener, self._check_health = log, listener, check_health
        self._commits = commits
        self._ledger = IncidentLog(log, listener.incident, plan.batch_size)
        self._roll = WorkerHealth(config, group, self._ledger)
        self._live = ControlFile(log.run_dir)
        chaotic = config.chaos.faults > 0
        self._chaos = Chaos(config.chaos, plan.total_steps, first_step) if chaotic else None
        self._scaling = Scaling(plan, config.spares, group, self._live, listener.note)
        self._generation, self._holders = Generation(), StateHolders()
        self._reports = Reports(
            config,
            group,
            log,
            commits,
            listener,
            ledger=self._ledger,
            roll=self._roll,
            chaos=self._chaos,
            generation=self._generation,
            holders=self._holders,
            first_step=first_step,
            micro_size=plan.micro_size,
        )
        self._ending = Ending(
            plan, group, store, log, commits, reports=self._reports, generation=self._generation, holders=self._holders
        )
        self._formed_at: tuple[int, int] | None = None
        self._stuck = self._in_vain = 0
        """Regroups that got nowhere."""
        self._abort_sent: float | None = None
        self._pause_sent = False
        self._saving = False
        self._first_step = first_step
        self._stopping = False
        self._idle_since: float | None = None

    def stop(self) -> None:
        """Ask for a clean end at the current step's end; safe in a signal handler."""
        self._stopping = True

    # -- the loop ---------------------------------------------------------------------

    def run(self) -> Outcome:
        """Until the run is over. Never raises for a fault of a worker."""
        if not self._group.handles:
            self._scaling.start(self._scaling.high + self._config.spares)
        while True:
            self._reports.poll(self._reports.reporter, POLL_S)
            self._log.flush()
            self._check_health()
            self._roll.call(self._generation.members, self._reports.committed)
            self._ask_for_checkpoint()
            self._scaling.hear(len(self._generation.members))
            self._reports.hear_of_saves()
            if self._reports.unsaved:
                return self._end(policy.End(TerminalState.FAILED, self._reports.unsaved), patience_s=5.0)
            if not (self._saving and self._commits.committing):
                decision = policy.decide(self._view())
                if isinstance(decision, policy.End):
                    return self._end(decision)
                self._act(decision)
            self._disturb()
            self._show("RUNNING")
            self._listener.tick()

    # -- what is known ----------------------------------------------------------------

    def _view(self) -> View:
        now = time.monotonic()
        workers = {
            w: self._roll.view(w, self._generation.members, self._generation.number, w in self._holders)
            for w in self._group.handles
        }
        idle = not any(
            workers[w].state is WorkerState.RUNNING and not workers[w].dead for w in self._generation.members
        )
        self._idle_since = (self._idle_since or now) if idle else None
        regroup = self._config.regroup
        return View(
            workers=workers,
            members=self._generation.members,
            generation=self._generation.number,
            min_workers=self._scaling.low,
            max_workers=self._scaling.high,
            failures=self._roll.failures + self._stuck,
            max_failures=regroup.max_failures + (self._chaos.allowance if self._chaos else 0),
            stopping=self._stopping,
            waited_s=now - self._idle_since if self._idle_since else 0.0,
            patience_s=regroup.wait_s,
            startable=self._scaling.startable(now, workers),
            spares=self._config.spares,
            saved_step=self._commits.step,
            save_tried=self._saving,
            earlier=frozenset(self._roll.earlier),
        )

    # -- acting -----------------------------------------------------------------------

    def _act(self, decision: policy.Decision) -> None:
        if isinstance(decision, policy.Abort):
            self._abort(decision.workers)
        elif isinstance(decision, policy.Pause):
            if not self._pause_sent:
                self._pause_sent = True
                for worker_id in self._generation.members:
                    self._group.pause(worker_id)
        elif isinstance(decision, policy.Form):
            self._form(decision)
        elif isinstance(decision, policy.Start):
            self._scaling.start(decision.count)
        elif isinstance(decision, policy.Retire):
            for worker_id in decision.workers:
                self._roll.retire(worker_id)
        elif isinstance(decision, policy.Restore):
            self._restore()

    def _abort(self, workers: tuple[str, ...]) -> None:
        now = time.monotonic()
        if self._abort_sent is None:
            self._abort_sent = now
            seen = self._roll.standstill(workers)
            if seen and self._reports.broke_at is None:
                self._reports.broke_at = ("standstill", int(time.time() * 1000), seen)
            for worker_id in workers:
                self._group.abort(worker_id, self._generation.number)
        elif now - self._abort_sent > _ABORT_S:
            for worker_id in workers:
                self._roll.dislodge(worker_id)

    def _form(self, decision: policy.Form) -> None:
        # Regroups that get nowhere must end: a network that always fails, an error in the
        # user's code that looks like a lost peer. Where a worker is gone, that was counted.
        world = len(decision.workers)
        here = (self._reports.committed, self._reports.micro_size)
        if here == self._formed_at and set(decision.workers) == set(self._generation.members):
            self._stuck += 1
            self._in_vain += 1
            if self._in_vain >= 2 and world > 1:
                # Somebody here can't be reached any more, and nobody can tell who: one leaves,
                # the others try; at the latest the last one goes on alone, and grows again.
                self._in_vain = 0
                suspect, why = decision.workers[0], "the members could not connect"
                self._roll.leaves(suspect, why, self._generation.members, self._reports.committed)
                return
        else:
            self._in_vain = 0
        self._formed_at = here
        if self._reports.broke_at is not None and not self._ledger.recovering:
            why, at, seen = self._reports.broke_at
            self._ledger.open(why, self._reports.committed, at_ms=at, detail=seen)
        self._generation.number += 1
        self._generation.members, self._saving = decision.workers, decision.save_only
        source = str(self._commits.newest) if decision.restore else None
        for rank, worker_id in enumerate(decision.workers):
            self._group.join(
                worker_id,
                Membership(
                    generation=self._generation.number,
                    rank=rank,
                    world_size=world,
                    store_host=self._store.host,
                    store_port=self._store.port,
                    slots=assign_slots(self._plan.slots, world),
                    micro_size=self._reports.micro_size,
                    behind=decision.behind,
                    restore_from=source,
                    save_only=decision.save_only,
                ),
            )
        self._holders.expect(decision, self._group.handles, self._commits.step)
        self._abort_sent, self._pause_sent, self._reports.broke_at = None, False, None
        self._commits.forget()
        self._ledger.regrouped(self._reports.committed)
        if not decision.save_only:
            self._listener.world(self._generation.number, world, self._reports.committed)

    def _restore(self) -> None:
        """All replicas are gone: the run goes on from its last checkpoint, or from its start."""
        members = [self._group.handles[w] for w in self._generation.members]
        if self._formed_at == (self._reports.committed, self._reports.micro_size):
            # A checkpoint that verifies here and can't be read there, again and again, is an end.
            self._stuck += all(not member.dead for member in members)
        for reason in self._commits.go_back():
            self._listener.note(f"skipped checkpoint: {reason}")
        source = self._commits.newest
        line = f"going on from {source.name}" if source else "starting again: no checkpoint yet"
        self._listener.note(f"no worker holds the state any more: {line}")
        if not self._ledger.recovering:
            self._ledger.open("state lost", self._reports.committed)
        self._ledger.lost(self._reports.committed - max(self._commits.step, 0))
        if source is None:
            # A replica that was in use can't be made new again.
            for worker_id, handle in self._group.handles.items():
                if not handle.dead and handle.status and handle.status.step > 0:
                    self._roll.retire(worker_id)
        self._generation.members = ()
        self._holders.lose_all()
        self._generation.number += 1  # whoever might still be alive of the old one is fenced off

    def _disturb(self) -> None:
        """Inject what chaos has in store for this moment."""
        if self._chaos is None:
            return
        handles = self._group.handles
        settled = (
            bool(self._generation.members)
            and not self._ledger.recovering
            and not self._pause_sent
            and all(
                not (h := handles[w]).dead
                and h.status is not None
                and (h.status.state, h.status.generation) == (WorkerState.RUNNING, self._generation.number)
                for w in self._generation.members
            )
        )
        dead = {w for w, handle in handles.items() if handle.dead}
        for worker_id, fault in self._chaos.tick(
            time.time(),
            self._generation.members,
            dead,
            self._generation.number,
            self._reports.committed,
            settled,
        ):
            self._group.inject(worker_id, fault)
            if fault.phase == "save":
                self._group.save(worker_id)

    def _ask_for_checkpoint(self) -> None:
        now, reporter = time.monotonic(), self._reports.reporter
        if reporter is None or self._commits.waiting or not self._commits.cadence.due(now):
            return
        self._commits.cadence.requested(now)
        self._group.save(reporter)

    def _show(self, state: str) -> None:
        handles = self._group.handles
        living = {w: handles[w].host for w in self._generation.members if not handles[w].dead}
        self._live.show(
            state=state,
            step=self._reports.committed,
            total_steps=self._plan.total_steps,
            generation=self._generation.number,
            world_size=len(living),
            members=living,
            workers={"min": self._scaling.low, "max": self._scaling.high},
            incidents=len(self._log.incidents),
            goodput=round(self._ledger.goodput, 4),
        )

    # -- the end ----------------------------------------------------------------------

    def _end(self, decision: policy.End, patience_s: float = SAVE_S) -> Outcome:
        statuses = {w: h.status for w, h in self._group.handles.items() if h.status}
        failures = [s.failure for s in statuses.values() if s.failure]
        self._ending.drain(5.0 if failures else patience_s)
        rescued = self._ending.rescue()
        if self._reports.unsaved:
            decision = policy.End(TerminalState.FAILED, self._reports.unsaved)
        statuses = {w: h.status for w, h in self._group.handles.items() if h.status}
        members = {w: s for w, s in statuses.items() if w in self._generation.members}
        hashes = {s.state_sha256 for s in members.values() if s.state_sha256}
        reason = decision.reason
        failure = failures[-1] if failures else self._roll.last_failure
        if failures and decision.state is TerminalState.FAILED:
            reason = f"{failures[-1].kind}: {failures[-1].message}"
        if len(hashes) > 1:
            self._listener.note("the replicas ended with different bits: please report this")
        self._show(str(decision.state))
        verdict = None
        if self._chaos is not None:
            self._chaos.finished(decision.state is TerminalState.FINISHED)
            verdict = self._chaos.verdict(sum(i.steps_lost for i in self._log.incidents))
        return Outcome(
            decision.state,
            reason,
            self._reports.committed,
            failure if decision.state is TerminalState.FAILED else None,
            self._commits.newest,
            min(hashes) if len(hashes) == 1 else None,
            self._ledger.wall_s,
            self._ledger.useful_s,
            (self._reports.committed - self._first_step) * self._plan.batch_size,
            self._log.incidents,
            max((s.peak_rss_mb for s in statuses.values()), default=0.0),
            {w: s.node for w, s in members.items()},
            verdict,
            rescued,
        )
