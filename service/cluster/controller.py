"""The controller: owns one run. Poll, decide, act, until the run is over."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from service.artifacts.place import Place
from service.cluster import policy
from service.cluster.chaos import Chaos, Verdict
from service.cluster.commits import Commits
from service.cluster.ledger import Ledger
from service.cluster.live import Live, ScaleRequest
from service.cluster.policy import View, WorkerView
from service.cluster.roll_call import RollCall
from service.cluster.run_log import RunLog
from service.cluster.worker_group import WorkerGroup
from service.config import RunConfig
from service.messages import (
    Incident,
    Membership,
    Notice,
    RunState,
    StepRecord,
    WorkerFailure,
    WorkerState,
    WorkerStatus,
)
from service.training.collectives import Store
from service.training.dealing import deal_slots
from service.training.plan import Plan

_POLL_S = 0.2
_ABORT_S = 10.0
"""A member that is told to leave its generation and doesn't within this time is replaced."""
_SAVE_S = 120.0
_WITHOUT_STATE = ("running", "restore", "join", "receive")
"""Phases of a generation in which a member that is behind may not have the state yet."""
_LOOK_EVERY_S = 1.0
"""Between two looks at the cluster for room."""


class Listener(Protocol):
    """Whoever wants to see the run: the live display, the tracking."""

    def record(self, record: StepRecord, world_size: int) -> None: ...
    def incident(self, incident: Incident) -> None: ...
    def world(self, generation: int, world_size: int, step: int) -> None: ...
    def note(self, line: str) -> None: ...
    def tick(self) -> None: ...


@dataclass
class Outcome:
    """How a run ended."""

    state: RunState
    reason: str
    step: int
    failure: WorkerFailure | None = None
    checkpoint: Place | None = None
    state_sha256: str | None = None
    wall_s: float = 0.0
    useful_s: float = 0.0
    samples: int = 0
    incidents: list[Incident] = field(default_factory=list)
    peak_rss_mb: float = 0.0
    workers: dict[str, str] = field(default_factory=dict)
    """The last generation's workers and the Ray nodes that they were on."""
    chaos: Verdict | None = None
    """How the run took the faults that were injected into it."""
    unsaved_at: Place | None = None
    """Where the last state should have been saved and could not be; `checkpoint` is in the run's folder then."""

    @property
    def goodput(self) -> float:
        """Time spent in committed steps over wall time."""
        return self.useful_s / self.wall_s if self.wall_s > 0 else 0.0


class Controller:
    """One run's state machine around the pure `policy.decide`."""

    def __init__(
        self, config: RunConfig, plan: Plan, group: WorkerGroup, store: Store, log: RunLog,
        commits: Commits, listener: Listener, *, first_step: int = 0,
        check_health: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._config, self._plan, self._group, self._store = config, plan, group, store
        self._log, self._listener, self._check_health = log, listener, check_health
        self._commits = commits
        self._ledger = Ledger(log, listener.incident, plan.batch_size)
        self._roll = RollCall(config, group, self._ledger)
        self._live = Live(log.run_dir)
        chaotic = config.chaos.faults > 0
        self._chaos = Chaos(config.chaos, plan.total_steps, first_step) if chaotic else None
        self._low, self._high = plan.min_workers, plan.max_workers
        self._members: tuple[str, ...] = ()
        self._generation = 0
        self._joined: set[str] = set()
        self._receiving: dict[str, int] = {}
        """Members that don't hold the state yet, and the step that they will have when they do."""
        self._differed: set[str] = set()
        self._micro_size = plan.micro_size
        self._halved_in = -1
        self._formed_at: tuple[int, int] | None = None
        self._stuck = self._in_vain = 0
        """Regroups that got nowhere."""
        self._broke_at: tuple[str, int, str] | None = None
        """Why and when (Unix ms) the generation broke, and what was seen of it, until its successor is formed."""
        self._abort_sent: float | None = None
        self._pause_sent = False
        self._saving = False
        self._unsaved = ""
        """Why a checkpoint that was required could not be written."""
        self._save_failed = False
        """Whether the last save that was heard of failed."""
        self._committed = self._first_step = first_step
        self._stopping = False
        self._idle_since: float | None = None
        self._room_asked = 0.0
        self._room = 0

    def stop(self) -> None:
        """Ask for a clean end at the current step's end; safe in a signal handler."""
        self._stopping = True

    # -- the loop ---------------------------------------------------------------------

    def run(self) -> Outcome:
        """Until the run is over. Never raises for a fault of a worker."""
        if not self._group.handles:
            self._start(self._high + self._config.spares)
        while True:
            for status in self._group.poll(
                acknowledged=(self._log.last_step, self._log.last_evaluation),
                reporter=self._reporter(), wait_s=_POLL_S,
            ):  # fmt: skip
                self._hear(status)
            self._log.flush()
            self._check_health()
            self._roll.call(self._members, self._committed)
            self._ask_for_checkpoint()
            self._scale()
            self._hear_of_saves()
            if self._unsaved:
                return self._end(policy.End(RunState.FAILED, self._unsaved), patience_s=5.0)
            if not (self._saving and self._commits.committing):
                decision = policy.decide(self._view())
                if isinstance(decision, policy.End):
                    return self._end(decision)
                self._act(decision)
            self._disturb()
            self._show("RUNNING")
            self._listener.tick()

    def _reporter(self) -> str | None:
        """Whose records are fetched: every member has the same, the lowest living rank's are taken."""
        return next((w for w in self._members if not self._group.handles[w].dead), None)

    def _hear(self, status: WorkerStatus) -> None:
        for part in status.parts:
            self._commits.collect(part)
        for notice in status.notices:
            if notice.kind == "injected":
                if self._chaos is not None:
                    self._chaos.notice(notice, status.worker_id)
            elif notice.generation == self._generation:
                self._hear_notice(notice)
        for record in status.records:
            if self._log.is_new(record):
                self._log.append(record)
                self._listener.record(record, len(self._members))
                self._recovered(record)
                if self._chaos is not None:
                    self._chaos.observe(record)
        self._committed = max(self._committed, status.step)
        self._find_holder(status)
        self._ledger.hear(status, status.worker_id == self._reporter())
        if status.leaving:
            self._roll.leaves(
                status.worker_id, "told to end (SIGTERM)", self._members, self._committed
            )
        if status.state is WorkerState.BROKEN and status.generation == self._generation:
            why = "out of memory" if status.out_of_memory else "connection lost"
            seen = f"{status.worker_id}, {status.broken_by}" if status.broken_by else ""
            self._broke_at = self._broke_at or (why, int(time.time() * 1000), seen)
        if status.diverged and status.generation == self._generation:
            self._joined -= {self._members[rank] for rank in status.diverged}
        if (
            status.out_of_memory
            and status.generation == self._generation != self._halved_in
            and self._micro_size > 1
        ):
            self._halved_in = self._generation  # once, however many workers say it how often
            self._micro_size = max(1, self._micro_size // 2)
            self._listener.note(f"out of memory: going on with batch.micro_size={self._micro_size}")

    def _hear_notice(self, notice: Notice) -> None:
        if not self._ledger.is_new(notice):
            return
        if notice.kind == "slots dealt":  # a measure, not a fault
            self._listener.note(f"step {notice.step}: {notice.detail}")
            return
        self._ledger.notice(notice, self._by_rank())
        if notice.kind == "straggler":
            self._replace_straggler(notice.rank)

    def _by_rank(self) -> dict[int, tuple[str, str]]:
        return {rank: (w, self._group.handles[w].host) for rank, w in enumerate(self._members)}

    def _replace_straggler(self, rank: int | None) -> None:
        if rank is not None and self._config.straggler.replace and rank < len(self._members):
            self._roll.slow.add(self._members[rank])

    def _recovered(self, record: StepRecord) -> None:
        took = self._ledger.committed(record)
        if took is not None:
            self._listener.note(
                f"recovered in {took:.2f} s: generation {self._generation}, {len(self._members)} "
                f"worker{'s' if len(self._members) != 1 else ''}, at step {record.step}"
            )

    # -- what is known ----------------------------------------------------------------

    def _view(self) -> View:
        now = time.monotonic()
        workers = {
            w: self._roll.view(w, self._members, self._generation, w in self._joined)
            for w in self._group.handles
        }
        idle = not any(
            workers[w].state is WorkerState.RUNNING and not workers[w].dead for w in self._members
        )
        self._idle_since = (self._idle_since or now) if idle else None
        regroup = self._config.regroup
        return View(
            workers=workers, members=self._members, generation=self._generation,
            min_workers=self._low, max_workers=self._high,
            failures=self._roll.failures + self._stuck, max_failures=regroup.max_failures + (self._chaos.allowance if self._chaos else 0),
            stopping=self._stopping, waited_s=now - self._idle_since if self._idle_since else 0.0,
            patience_s=regroup.wait_s, startable=self._startable(now, workers),
            spares=self._config.spares, saved_step=self._commits.step,
            save_tried=self._saving,
            earlier=frozenset(self._roll.earlier),
        )  # fmt: skip

    def _startable(self, now: float, workers: Mapping[str, WorkerView]) -> int:
        if sum(v.staying for v in workers.values()) >= self._high + self._config.spares:
            return 0
        if now - self._room_asked > _LOOK_EVERY_S:  # an answer costs a round trip to the cluster
            self._room_asked, self._room = now, self._group.startable()
        return self._room

    # -- acting -----------------------------------------------------------------------

    def _act(self, decision: policy.Decision) -> None:
        if isinstance(decision, policy.Abort):
            self._abort(decision.workers)
        elif isinstance(decision, policy.Pause):
            if not self._pause_sent:
                self._pause_sent = True
                for worker_id in self._members:
                    self._group.pause(worker_id)
        elif isinstance(decision, policy.Form):
            self._form(decision)
        elif isinstance(decision, policy.Start):
            self._start(decision.count)
        elif isinstance(decision, policy.Retire):
            for worker_id in decision.workers:
                self._roll.retire(worker_id)
        elif isinstance(decision, policy.Restore):
            self._restore()

    def _start(self, count: int) -> None:
        self._group.start(count)
        self._room_asked = time.monotonic()
        self._room = 0

    def _abort(self, workers: tuple[str, ...]) -> None:
        now = time.monotonic()
        if self._abort_sent is None:
            self._abort_sent = now
            for worker_id in workers:
                self._group.abort(worker_id, self._generation)
        elif now - self._abort_sent > _ABORT_S:
            for worker_id in workers:
                self._group.kill(worker_id, "could not be brought to leave its generation")

    def _form(self, decision: policy.Form) -> None:
        # Regroups that get nowhere must end: a network that always fails, an error in the
        # user's code that looks like a lost peer. Where a worker is gone, that was counted.
        world = len(decision.workers)
        here = (self._committed, self._micro_size)
        if here == self._formed_at and set(decision.workers) == set(self._members):
            self._stuck += 1
            self._in_vain += 1
            if self._in_vain >= 2 and world > 1:
                # Somebody here can't be reached any more, and nobody can tell who: one leaves,
                # the others try; at the latest the last one goes on alone, and grows again.
                self._in_vain = 0
                suspect, why = decision.workers[0], "the members could not connect"
                self._roll.leaves(suspect, why, self._members, self._committed)
                return
        else:
            self._in_vain = 0
        self._formed_at = here
        if self._broke_at is not None and not self._ledger.recovering:
            why, at, seen = self._broke_at
            self._ledger.open(why, self._committed, at_ms=at, detail=seen)
        self._generation += 1
        self._members, self._saving = decision.workers, decision.save_only
        source = str(self._commits.newest) if decision.restore else None
        for rank, worker_id in enumerate(decision.workers):
            self._group.join(worker_id, Membership(
                generation=self._generation, rank=rank, world_size=world,
                store_host=self._store.host, store_port=self._store.port,
                slots=deal_slots(self._plan.slots, world), micro_size=self._micro_size,
                behind=decision.behind, restore_from=source,
                save_only=decision.save_only,
            ))  # fmt: skip
        self._expect_holders(decision)
        self._abort_sent, self._pause_sent, self._broke_at = None, False, None
        self._commits.forget()
        self._ledger.regrouped(self._committed)
        if not decision.save_only:
            self._listener.world(self._generation, world, self._committed)

    def _expect_holders(self, decision: policy.Form) -> None:
        """Who is told to receive the state holds it only once it has: the source may die before."""
        source = self._group.handles[decision.workers[0]].status
        step = self._commits.step if decision.restore else source.step if source else 0
        # Before the first step all hold the same, whoever sends: the seed decides it.
        # A checkpoint nobody holds until all have exchanged what they read of it.
        ranks = range(len(decision.workers)) if decision.restore else decision.behind
        awaited = {decision.workers[rank] for rank in ranks} if step > 0 else set()
        self._joined.update(set(decision.workers) - awaited)
        self._receiving = dict.fromkeys(awaited - self._joined, step)
        # One that differed has the step already, and not the state.
        self._differed = {
            w for w in self._receiving
            if (status := self._group.handles[w].status) and status.step >= step
        }  # fmt: skip

    def _find_holder(self, status: WorkerStatus) -> None:
        """Note when a member has received what it was to receive."""
        step = self._receiving.get(status.worker_id)
        if step is None or status.generation != self._generation or status.step < step:
            return
        before = status.phase in _WITHOUT_STATE or status.state is WorkerState.BROKEN
        if not (before and status.worker_id in self._differed):
            self._joined.add(status.worker_id)
            del self._receiving[status.worker_id]

    def _restore(self) -> None:
        """All replicas are gone: the run goes on from its last checkpoint, or from its start."""
        members = [self._group.handles[w] for w in self._members]
        if self._formed_at == (self._committed, self._micro_size):
            # A checkpoint that verifies here and can't be read there, again and again, is an end.
            self._stuck += all(not member.dead for member in members)
        for reason in self._commits.go_back():
            self._listener.note(f"skipped checkpoint: {reason}")
        source = self._commits.newest
        line = f"going on from {source.name}" if source else "starting again: no checkpoint yet"
        self._listener.note(f"no worker holds the state any more: {line}")
        if not self._ledger.recovering:
            self._ledger.open("state lost", self._committed)
        self._ledger.lost(self._committed - max(self._commits.step, 0))
        if source is None:
            # A replica that was in use can't be made new again.
            for worker_id, handle in self._group.handles.items():
                if not handle.dead and handle.status and handle.status.step > 0:
                    self._roll.retire(worker_id)
        self._members, self._joined = (), set()
        self._generation += 1  # whoever might still be alive of the old one is fenced off

    def _disturb(self) -> None:
        """Inject what chaos has in store for this moment."""
        if self._chaos is None:
            return
        handles = self._group.handles
        settled = bool(self._members) and not self._ledger.recovering and not self._pause_sent and all(
            not (h := handles[w]).dead and h.status is not None
            and (h.status.state, h.status.generation) == (WorkerState.RUNNING, self._generation)
            for w in self._members
        )  # fmt: skip
        dead = {w for w, handle in handles.items() if handle.dead}
        for worker_id, fault in self._chaos.tick(
            time.time(), self._members, dead, self._generation, self._committed, settled
        ):
            self._group.inject(worker_id, fault)
            if fault.phase == "save":
                self._group.save(worker_id)

    def _scale(self) -> None:
        request = self._live.asked()
        if request is None:
            return
        wrong = self._cannot_scale(request)
        if wrong is None:
            self._low, self._high = request.low, request.high
            now = len(self._members)
            self._live.answer(request, True, f"{now} workers now, {request.high} wanted")
            self._listener.note(f"asked for {request.high} workers, {now} now")
        else:
            self._live.answer(request, False, wrong)

    def _cannot_scale(self, request: ScaleRequest) -> str | None:
        if not 1 <= request.low <= request.high:
            return f"workers={request.low}…{request.high}: at least 1, and min not above max"
        if request.high > self._plan.slots:
            return (
                f"workers={request.high}: the run's global batch was cut into slots={self._plan.slots} at "
                f"its start, so it can use {self._plan.slots} workers at the most"
            )
        room = self._group.placeable()
        if request.high > room:
            return f"workers={request.high}: the cluster can place {room} of this size"
        return None

    def _ask_for_checkpoint(self) -> None:
        now, reporter = time.monotonic(), self._reporter()
        if reporter is None or self._commits.waiting or not self._commits.cadence.due(now):
            return
        self._commits.cadence.asked(now)
        self._group.save(reporter)

    def _hear_of_saves(self) -> None:
        """One that has failed is told, and tried again soon; where it is required, it is the end."""
        for saved in self._commits.news():
            self._save_failed = saved.error is not None
            if saved.error is not None:
                self._ledger.note("checkpoint failed", saved.step, detail=saved.error)
                if self._config.checkpoint.required:
                    self._unsaved = f"checkpoint.required=true: {saved.error}"

    def _show(self, state: str) -> None:
        handles = self._group.handles
        living = {w: handles[w].host for w in self._members if not handles[w].dead}
        self._live.show(
            state=state, step=self._committed, total_steps=self._plan.total_steps,
            generation=self._generation, world_size=len(living), members=living,
            workers={"min": self._low, "max": self._high}, incidents=len(self._log.incidents),
            goodput=round(self._ledger.goodput, 4),
        )  # fmt: skip

    # -- the end ----------------------------------------------------------------------

    def _end(self, decision: policy.End, patience_s: float = _SAVE_S) -> Outcome:
        statuses = {w: h.status for w, h in self._group.handles.items() if h.status}
        failures = [s.failure for s in statuses.values() if s.failure]
        self._drain(5.0 if failures else patience_s)
        rescued = self._rescue()
        if self._unsaved:
            decision = policy.End(RunState.FAILED, self._unsaved)
        statuses = {w: h.status for w, h in self._group.handles.items() if h.status}
        members = {w: s for w, s in statuses.items() if w in self._members}
        hashes = {s.state_sha256 for s in members.values() if s.state_sha256}
        reason = decision.reason
        failure = failures[-1] if failures else self._roll.last_failure
        if failures and decision.state is RunState.FAILED:
            reason = f"{failures[-1].kind}: {failures[-1].message}"
        if len(hashes) > 1:
            self._listener.note("the replicas ended with different bits: please report this")
        self._show(str(decision.state))
        verdict = None
        if self._chaos is not None:
            self._chaos.finished(decision.state is RunState.FINISHED)
            verdict = self._chaos.verdict(sum(i.steps_lost for i in self._log.incidents))
        return Outcome(
            decision.state, reason, self._committed,
            failure if decision.state is RunState.FAILED else None, self._commits.newest,
            min(hashes) if len(hashes) == 1 else None, self._ledger.wall_s, self._ledger.useful_s,
            (self._committed - self._first_step) * self._plan.batch_size, self._log.incidents,
            max((s.peak_rss_mb for s in statuses.values()), default=0.0),
            {w: s.node for w, s in members.items()}, verdict, rescued,
        )  # fmt: skip

    def _rescue(self) -> Place | None:
        """Save the last state into the run's own folder when it could not be saved where it belongs.

        Returns the place that didn't take it, None where nothing had to be, or could be, rescued.
        """
        holders = [
            w for w in self._members
            if w in self._joined and not (h := self._group.handles[w]).dead and h.status is not None
            and h.status.step == self._committed and h.status.state in policy.ALIVE_IDLE
        ]  # fmt: skip
        wanted = self._commits.root
        if not self._save_failed or self._commits.step >= self._committed or not holders:
            return None
        local = self._commits.move_to_rescue()
        if local is None:
            return None
        self._generation += 1
        members, self._members = self._members, (holders[0],)
        self._group.join(holders[0], Membership(
            generation=self._generation, rank=0, world_size=1, store_host=self._store.host,
            store_port=self._store.port, slots=deal_slots(self._plan.slots, 1),
            micro_size=self._micro_size, save_only=True, save_to=str(local),
        ))  # fmt: skip
        deadline = time.monotonic() + _SAVE_S
        handle = self._group.handles[holders[0]]
        while time.monotonic() < deadline and not handle.dead:
            for status in self._group.poll(
                acknowledged=(self._log.last_step, self._log.last_evaluation), reporter=None, wait_s=_POLL_S,
            ):  # fmt: skip
                self._hear(status)
            now = handle.status
            if now is not None and now.generation == self._generation and now.state is not WorkerState.RUNNING:  # fmt: skip
                break
        self._drain(deadline - time.monotonic())
        self._members = members
        return wanted if self._commits.step == self._committed else None

    def _drain(self, patience_s: float) -> None:
        """Fetch what the members still hold: the last records, and the parts of the last checkpoint."""
        deadline = time.monotonic() + patience_s
        waiting = {w for w in self._members if not self._group.handles[w].dead}
        quiet = 0
        while waiting and quiet < 2 and time.monotonic() < deadline:
            before = (self._log.last_step, self._log.last_evaluation, self._commits.newest)
            for status in self._group.poll(
                acknowledged=before[:2], reporter=self._reporter(), wait_s=0.02,
            ):  # fmt: skip
                self._hear(status)
                waiting.discard(status.worker_id)
            waiting = {w for w in waiting if not self._group.handles[w].dead}
            now = (self._log.last_step, self._log.last_evaluation, self._commits.newest)
            done = not waiting and not self._commits.waiting
            quiet = quiet + 1 if done and before == now else 0
            if done and quiet < 2:
                waiting = {w for w in self._members if not self._group.handles[w].dead}
        self._commits.settle(deadline - time.monotonic())
        self._hear_of_saves()
        self._log.flush()
