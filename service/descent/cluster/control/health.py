"""Who is lost, who is about to go, who is too slow: what is known of the workers beyond their own words."""

import time
from typing import TypeGuard

from descent.cluster.control.policy import Failure, WorkerView
from descent.cluster.record.incidents import IncidentLog
from descent.cluster.workers.group import Handle, WorkerGroup
from descent.config import RunConfig
from descent.messages import WorkerFailure, WorkerState, WorkerStatus

_LOOK_EVERY_S = 1.0
"""Between two looks at the cluster for nodes that are going away."""

_START_S = 30.0
"""A new actor may take this long to answer, and to be built, whatever regroup.wait_s and stall_s are."""

_AT_STORAGE = ("finish", "restore", "join")
"""Phases that wait for a disk or a server, whose own tries end, or for a member that does."""
_STORAGE_PATIENCE = 4.0
"""How many times regroup.stall_s such a phase may take."""


class WorkerHealth:
    """Finds the silent and the dead, hears goodbyes, and counts what counts as a crash."""

    def __init__(self, config: RunConfig, group: WorkerGroup, ledger: IncidentLog) -> None:
        self._config, self._group, self._ledger = config, group, ledger
        self.failures = 0
        """Crashes so far: what regroup.max_failures bounds. Preemptions aren't."""
        self.earlier: set[Failure] = set()
        """What workers that were replaced had raised."""
        self.last_failure: WorkerFailure | None = None
        self.slow: set[str] = set()
        self._leaving: set[str] = set()
        self._counted: set[str] = set()
        self._drains_asked = 0.0

    def call(self, members: tuple[str, ...], step: int) -> None:
        """Kill who hangs, note who is dead or about to go."""
        for worker_id, handle in self._group.handles.items():
            if not handle.dead:
                self._kill_if_hanging(worker_id, handle, members)
        for worker_id, handle in self._group.handles.items():
            if handle.dead and worker_id not in self._counted:
                self._counted.add(worker_id)
                self._lost(worker_id, handle, members, step)
        self._find_drained(members, step)

    def _kill_if_hanging(self, worker_id: str, handle: Handle, members: tuple[str, ...]) -> None:
        heartbeat = self._config.regroup.heartbeat_s
        wait_s = max(self._config.regroup.wait_s, _START_S)
        if not handle.answered and self._group.unheard_s(worker_id) > wait_s:
            self._counted.add(worker_id)
            self._group.retire(worker_id, f"could not be placed within {wait_s:g} s")
        elif self._group.silent_for(worker_id) > heartbeat:
            self._group.kill(worker_id, f"no answer for {heartbeat:g} s")
        elif worker_id not in members and self._stalled(handle.status):
            # A member's peers stand still with it: the policy finds out who is to blame.
            self._group.kill(worker_id, _standstill(handle.status))

    def _stalled(self, status: WorkerStatus | None) -> TypeGuard[WorkerStatus]:
        if status is None or status.state not in (WorkerState.RUNNING, WorkerState.STARTING):
            return False
        patience_s = self._config.regroup.stall_s
        if status.phase in _AT_STORAGE:
            patience_s *= _STORAGE_PATIENCE
        if status.state is WorkerState.STARTING:
            patience_s = max(patience_s, _START_S)
        return status.phase_age_s > patience_s

    def standstill(self, members: tuple[str, ...]) -> str:
        """What the members that make no progress were last seen doing; empty while all do."""
        statuses = ((w, self._group.handles[w].status) for w in members)
        return "; ".join(f"{w}: {_standstill(s)}" for w, s in statuses if self._stalled(s))

    def dislodge(self, worker_id: str) -> None:
        """End a member that was told to leave its generation and doesn't: it is the one that is stuck."""
        status = self._group.handles[worker_id].status
        where = f", stuck in '{status.phase}'" if status is not None else ""
        self._group.kill(worker_id, f"could not be brought to leave its generation{where}")

    def _lost(self, worker_id: str, handle: Handle, members: tuple[str, ...], step: int) -> None:
        """A crash counts; a worker that went with its node, or had said goodbye, doesn't."""
        self.failures += not (handle.preempted or worker_id in self._leaving)
        kind = "node lost" if handle.preempted else "worker lost"
        if worker_id in members:
            self._ledger.open(
                kind,
                step,
                unheard_s=self._group.unheard_s(worker_id),
                worker=worker_id,
                host=handle.host,
                detail=handle.why_dead,
            )
        else:
            self._ledger.note(kind, step, worker=worker_id, host=handle.host, detail=handle.why_dead)

    def _find_drained(self, members: tuple[str, ...], step: int) -> None:
        now = time.monotonic()
        if now - self._drains_asked < _LOOK_EVERY_S:
            return
        self._drains_asked = now
        draining = self._group.draining()
        for worker_id, handle in self._group.handles.items():
            if not handle.dead and handle.status is not None and handle.status.node in draining:
                self.leaves(worker_id, "its node is being drained", members, step)

    def leaves(self, worker_id: str, why: str, members: tuple[str, ...], step: int) -> None:
        """A worker announces its end: a pause and a goodbye, not a fault."""
        if worker_id in self._leaving:
            return
        self._leaving.add(worker_id)
        if worker_id in members:
            self._ledger.open(
                "preempted",
                step,
                interrupts=False,
                worker=worker_id,
                host=self._group.handles[worker_id].host,
                detail=why,
            )
            self._group.save(worker_id)  # in case it goes before somebody else has its state

    def retire(self, worker_id: str) -> None:
        """Let a worker go: one that nobody needs, or one that alone raised something."""
        status = self._group.handles[worker_id].status
        failure = status.failure if status else None
        if failure is None:
            self._counted.add(worker_id)
            self._group.retire(worker_id, "no longer needed")
            return
        # Only this one raised it, for the first time: perhaps its machine is to blame.
        self.earlier.add((failure.kind, failure.step + 1))
        self.last_failure = failure
        self._group.kill(worker_id, f"{failure.kind}: {failure.message}"[:300])

    def view(self, worker_id: str, members: tuple[str, ...], generation: int, joined: bool) -> WorkerView:
        """The worker as the policy sees it."""
        handle = self._group.handles[worker_id]
        status, leaving = handle.status, worker_id in self._leaving
        if status is None:
            return WorkerView(WorkerState.STARTING, handle.dead, joined=joined, leaving=leaving)
        state = status.state
        behind = worker_id in members and status.generation < generation
        if behind and state is not WorkerState.FAILED:
            state = WorkerState.RUNNING  # told to join, not yet heard of there
        failure = status.failure
        return WorkerView(
            state,
            handle.dead,
            status.generation,
            (status.step, status.evaluated),
            joined,
            leaving,
            worker_id in self.slow,
            stalled=self._stalled(status),
            failure=(failure.kind, failure.step + 1) if failure is not None else None,
        )


def _standstill(status: WorkerStatus) -> str:
    return f"no progress in '{status.phase}' for {status.phase_age_s:.0f} s"
