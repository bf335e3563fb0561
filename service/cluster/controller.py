"""The controller: owns one run. Poll, decide, act, until the run is over."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from service.artifacts import checkpoint
from service.cluster import policy
from service.cluster.policy import View, WorkerView, deal_slots
from service.cluster.run_log import RunLog
from service.cluster.worker_group import WorkerGroup
from service.config import RunConfig
from service.errors import CheckpointError, DescentError
from service.messages import (
    Incident,
    Membership,
    PartWritten,
    RunState,
    StepRecord,
    WorkerFailure,
    WorkerState,
    WorkerStatus,
)
from service.training.collectives import Store
from service.training.plan import Plan

_POLL_S = 0.2
_ABORT_S = 10.0
"""A member that is told to leave its generation and doesn't within this time is replaced."""
_SAVE_S = 120.0


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
    checkpoint: Path | None = None
    state_sha256: str | None = None
    wall_s: float = 0.0
    samples: int = 0
    incidents: list[Incident] = field(default_factory=list)
    peak_rss_mb: float = 0.0
    workers: dict[str, str] = field(default_factory=dict)
    """The last generation's workers and the Ray nodes that they were on."""


class Controller:
    """One run's state machine around the pure `policy.decide`."""

    def __init__(
        self, config: RunConfig, plan: Plan, group: WorkerGroup, store: Store, log: RunLog,
        checkpoints: Path, listener: Listener, *, config_sha256: str, restore_from: Path | None = None,
        first_step: int = 0, check_health: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._config, self._plan, self._group, self._store = config, plan, group, store
        self._log, self._listener, self._check_health = log, listener, check_health
        self._checkpoints, self._config_sha256 = checkpoints, config_sha256
        self._restore_from = restore_from
        self._members: tuple[str, ...] = ()
        self._generation = 0
        self._joined: set[str] = set()
        self._micro_size = plan.micro_size
        self._halved_in = -1
        self._formed_at: tuple[int, int] | None = None
        self._failures = 0
        self._counted: set[str] = set()
        self._parts: dict[tuple[int, int], dict[int, PartWritten]] = {}
        self._abort_sent: float | None = None
        self._pause_sent = False
        self._fault_seen: float | None = None
        self._committed = first_step
        self._last_save = time.monotonic()
        self._stopping = False
        self._idle_since: float | None = None
        self._started_at = time.monotonic()
        self._first_step = first_step
        self._checkpoint: Path | None = restore_from
        self._room_asked = 0.0
        self._room = 0

    def stop(self) -> None:
        """Ask for a clean end at the current step's end; safe in a signal handler."""
        self._stopping = True

    # -- the loop ---------------------------------------------------------------------

    def run(self) -> Outcome:
        """Until the run is over. Never raises for a fault of a worker."""
        if not self._group.handles:
            self._start(self._plan.max_workers)
        while True:
            for status in self._group.poll(
                acknowledged=(self._log.last_step, self._log.last_evaluation),
                reporter=self._reporter(), wait_s=_POLL_S,
            ):  # fmt: skip
                self._hear(status)
            self._log.flush()
            self._check_health()
            self._find_silent()
            self._ask_for_checkpoint()
            decision = policy.decide(self._view())
            if isinstance(decision, policy.End):
                return self._end(decision)
            self._act(decision)
            self._listener.tick()

    def _reporter(self) -> str | None:
        """Whose records are fetched: every member has the same, the lowest living rank's are taken."""
        return next((w for w in self._members if not self._group.handles[w].dead), None)

    def _hear(self, status: WorkerStatus) -> None:
        for part in status.parts:
            self._collect(part)
        for record in status.records:
            if self._log.is_new(record):
                self._log.append(record)
                self._listener.record(record, len(self._members))
        self._committed = max(self._committed, status.step)
        if (
            self._fault_seen is not None
            and status.state is WorkerState.RUNNING
            and status.generation == self._generation
        ):
            self._recovered()
        if (
            status.out_of_memory
            and status.generation == self._generation != self._halved_in
            and self._micro_size > 1
        ):
            self._halved_in = self._generation  # once, however many workers say it how often
            self._micro_size = max(1, self._micro_size // 2)
            self._listener.note(f"out of memory: going on with batch.micro_size={self._micro_size}")

    def _find_silent(self) -> None:
        for worker_id, handle in self._group.handles.items():
            if handle.dead:
                continue
            if self._group.silent_for(worker_id) > self._config.regroup.heartbeat_s:
                self._group.kill(worker_id, f"no answer for {self._config.regroup.heartbeat_s:g} s")
            status = handle.status
            if (
                status is not None
                and status.state is WorkerState.RUNNING
                and status.phase_age_s > self._config.regroup.stall_s
            ):
                self._group.kill(
                    worker_id, f"no progress in '{status.phase}' for {status.phase_age_s:.0f} s"
                )
        for worker_id, handle in self._group.handles.items():
            if handle.dead and worker_id not in self._counted:
                self._counted.add(worker_id)
                self._lost(worker_id)

    def _lost(self, worker_id: str) -> None:
        handle = self._group.handles[worker_id]
        self._failures += 1
        if worker_id in self._members:
            self._fault_seen = self._fault_seen or time.monotonic()
        host = handle.status.host if handle.status else ""
        incident = Incident(
            kind="worker lost", step=self._committed, time_ms=int(time.time() * 1000),
            worker=worker_id, host=host, detail=handle.why_dead,
        )  # fmt: skip
        self._log.incident(incident)
        self._listener.incident(incident)

    def _recovered(self) -> None:
        assert self._fault_seen is not None
        took = time.monotonic() - self._fault_seen
        self._fault_seen = None
        if self._log.incidents:
            self._log.incidents[-1] = replace(self._log.incidents[-1], recovered_in_s=took)
        self._listener.note(
            f"regrouped in {took:.2f} s: generation {self._generation}, {len(self._members)} workers, no step lost"
        )

    # -- what is known ----------------------------------------------------------------

    def _view(self) -> View:
        now = time.monotonic()
        workers = {w: self._worker_view(w) for w in self._group.handles}
        idle = not any(
            workers[w].state is WorkerState.RUNNING and not workers[w].dead for w in self._members
        )
        self._idle_since = (self._idle_since or now) if idle else None
        return View(
            workers=workers, members=self._members, generation=self._generation,
            min_workers=self._plan.min_workers, max_workers=self._plan.max_workers,
            failures=self._failures, max_failures=self._config.regroup.max_failures,
            stopping=self._stopping, waited_s=now - self._idle_since if self._idle_since else 0.0,
            patience_s=self._config.regroup.wait_s, startable=self._startable(now, workers),
        )  # fmt: skip

    def _startable(self, now: float, workers: Mapping[str, WorkerView]) -> int:
        alive = sum(not v.dead for v in workers.values())
        if alive >= self._plan.max_workers:
            return 0
        if now - self._room_asked > 1.0:  # an answer costs a round trip to the cluster
            self._room_asked, self._room = now, self._group.startable()
        return self._room

    def _worker_view(self, worker_id: str) -> WorkerView:
        handle = self._group.handles[worker_id]
        status = handle.status
        if status is None:
            return WorkerView(WorkerState.STARTING, handle.dead)
        state = status.state
        if (
            worker_id in self._members
            and status.generation < self._generation
            and state is not WorkerState.FAILED
        ):
            state = WorkerState.RUNNING  # told to join, not yet heard of there
        return WorkerView(
            state,
            handle.dead,
            status.generation,
            (status.step, status.evaluated),
            worker_id in self._joined,
        )

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
        elif isinstance(decision, policy.Restore):
            self._restore()

    def _start(self, count: int) -> None:
        source = self._checkpoint if self._restore_from is not None else None
        started = self._group.start(count, str(source) if source else None)
        if source is not None and not self._members:
            self._joined.update(started)  # they hold the checkpoint's state
        self._room_asked = time.monotonic()
        self._room = 0

    def _abort(self, workers: tuple[str, ...]) -> None:
        now = time.monotonic()
        self._fault_seen = self._fault_seen or now
        if self._abort_sent is None:
            self._abort_sent = now
            for worker_id in workers:
                self._group.abort(worker_id, self._generation)
        elif now - self._abort_sent > _ABORT_S:
            for worker_id in workers:
                self._group.kill(worker_id, "could not be brought to leave its generation")

    def _form(self, decision: policy.Form) -> None:
        # Regroups that get nowhere must end: a network that always fails, an error in the
        # user's code that looks like a lost peer.
        here = (self._committed, self._micro_size)
        if here == self._formed_at:
            self._failures += 1
        self._formed_at = here
        self._generation += 1
        self._members = decision.workers
        world = len(decision.workers)
        behind = decision.behind
        if self._generation == 1 and self._restore_from is None:
            behind = tuple(range(1, world))
        for rank, worker_id in enumerate(decision.workers):
            self._group.join(worker_id, Membership(
                generation=self._generation, rank=rank, world_size=world,
                store_host=self._store.host, store_port=self._store.port,
                slots=deal_slots(self._plan.slots, world), micro_size=self._micro_size, behind=behind,
            ))  # fmt: skip
        self._joined.update(decision.workers)
        self._abort_sent, self._pause_sent = None, False
        self._parts.clear()
        self._last_save = time.monotonic()
        self._listener.world(self._generation, world, self._committed)

    def _restore(self) -> None:
        """All replicas are gone: the run goes on from its last checkpoint, or from its start."""
        try:
            target, skipped = checkpoint.newest(self._checkpoints)
            self._checkpoint = self._restore_from = target
            line = f"all workers are gone: going on from {target.name}"
        except CheckpointError:
            self._checkpoint = self._restore_from = None
            skipped, line = (
                [],
                "all workers are gone and there is no checkpoint yet: starting again from step 0",
            )
        for reason in skipped:
            self._listener.note(f"skipped checkpoint: {reason}")
        self._listener.note(line)
        self._members, self._joined = (), set()
        self._generation += 1  # whoever might still be alive of the old one is fenced off

    # -- checkpoints ------------------------------------------------------------------

    def _ask_for_checkpoint(self) -> None:
        every = self._config.checkpoint.every_s
        if every is None or not self._members or time.monotonic() - self._last_save < every:
            return
        self._last_save = time.monotonic()
        reporter = self._reporter()
        if reporter is not None:
            self._group.save(reporter)

    def _collect(self, part: PartWritten) -> None:
        """Commit a checkpoint once every rank's share is on disk."""
        key = (part.generation, part.step)
        parts = self._parts.setdefault(key, {})
        parts[part.rank] = part
        if len(parts) < part.world_size:
            return
        del self._parts[key]
        failed = [p for p in parts.values() if p.error]
        try:
            if failed:
                raise CheckpointError(str(failed[0].error))
            ordered = [parts[r] for r in range(part.world_size)]
            self._checkpoint = checkpoint.commit(
                self._checkpoints,
                ordered,
                run=self._log.run_dir.name,
                config_sha256=self._config_sha256,
            )
            checkpoint.prune(self._checkpoints, self._config.checkpoint.keep_last)
        except (DescentError, OSError) as error:
            incident = Incident(
                "checkpoint failed", part.step, int(time.time() * 1000), detail=str(error)
            )
            self._log.incident(incident)
            self._listener.incident(incident)

    # -- the end ----------------------------------------------------------------------

    def _end(self, decision: policy.End) -> Outcome:
        self._drain(_SAVE_S if decision.state is not RunState.FAILED else 5.0)
        failures = [
            h.status.failure for h in self._group.handles.values() if h.status and h.status.failure
        ]
        hashes = {
            h.status.state_sha256
            for w, h in self._group.handles.items()
            if w in self._members and h.status and h.status.state_sha256
        }
        reason = decision.reason
        if failures and decision.state is RunState.FAILED:
            reason = f"{failures[0].kind}: {failures[0].message}"
        if len(hashes) > 1:
            self._listener.note("the replicas ended with different bits: please report this")
        nodes = {
            w: h.status.node
            for w, h in self._group.handles.items()
            if w in self._members and h.status
        }
        peak = max(
            (h.status.peak_rss_mb for h in self._group.handles.values() if h.status), default=0.0
        )
        return Outcome(
            decision.state, reason, self._committed, failures[0] if failures else None, self._checkpoint,
            min(hashes) if len(hashes) == 1 else None, time.monotonic() - self._started_at,
            (self._committed - self._first_step) * self._plan.batch_size, self._log.incidents, peak, nodes,
        )  # fmt: skip

    def _drain(self, patience_s: float) -> None:
        """Fetch what the members still hold: the last records, and the parts of the last checkpoint."""
        deadline = time.monotonic() + patience_s
        waiting = {w for w in self._members if not self._group.handles[w].dead}
        quiet = 0
        while waiting and quiet < 2 and time.monotonic() < deadline:
            before = (self._log.last_step, self._log.last_evaluation, self._checkpoint)
            for status in self._group.poll(
                acknowledged=before[:2], reporter=self._reporter(), wait_s=0.02,
            ):  # fmt: skip
                self._hear(status)
                waiting.discard(status.worker_id)
            waiting = {w for w in waiting if not self._group.handles[w].dead}
            done = not waiting and not self._parts
            quiet = (
                quiet + 1
                if done
                and before == (self._log.last_step, self._log.last_evaluation, self._checkpoint)
                else 0
            )
            if done and quiet < 2:
                waiting = {w for w in self._members if not self._group.handles[w].dead}
        self._log.flush()
