"""Deadlines of a worker: whether it hangs, and whether its training thread is stuck. No state, no action."""

from typing import TypeGuard

from descent.cluster.workers.group import WorkerInfo
from descent.config.schema import Regroup
from descent.messages import WorkerState, WorkerStatus

_START_S = 30.0
"""A new actor may take this long to answer, and to be built, whatever regroup.wait_s and stall_s are."""

_STORAGE_PHASES = ("finish", "restore", "join")
"""Phases that wait for a disk or a server, whose own retries end, or for a member that does."""
_STORAGE_PATIENCE = 4.0
"""How many times regroup.stall_s such a phase may take."""


class WorkerHealth:
    """Judges workers by the deadlines of the config."""

    def __init__(self, regroup: Regroup) -> None:
        self._heartbeat_s, self._stall_s = regroup.heartbeat_s, regroup.stall_s
        self._start_s = max(regroup.wait_s, _START_S)

    def not_started(self, worker: WorkerInfo, since_start_s: float) -> str | None:
        """Why a worker that has never answered is given up; None while it may still be starting."""
        late = worker.status is None and since_start_s > self._start_s
        return f"could not be placed within {self._start_s:g} s" if late else None

    def hangs(self, worker: WorkerInfo, unanswered_s: float, *, is_member: bool) -> str | None:
        """Why a worker must be ended, as far as that can be seen from itself alone; None if it is well.

        A member that makes no progress isn't judged here: its peers stand still with it, and only an
        abort shows which of them is stuck.
        """
        if unanswered_s > self._heartbeat_s:
            return f"no answer for {self._heartbeat_s:g} s"
        if not is_member and self.stalled(worker.status):
            return _standstill(worker.status)
        return None

    def stalled(self, status: WorkerStatus | None) -> TypeGuard[WorkerStatus]:
        """Whether the training thread has been in one phase for longer than it may."""
        if status is None or status.state not in (WorkerState.RUNNING, WorkerState.STARTING):
            return False
        patience_s = self._stall_s
        if status.phase in _STORAGE_PHASES:
            patience_s *= _STORAGE_PATIENCE
        if status.state is WorkerState.STARTING:
            patience_s = max(patience_s, _START_S)
        return status.phase_age_s > patience_s

    def standstill(self, workers: list[WorkerInfo]) -> str:
        """The phases in which these workers are stalled, as one line; empty where none is."""
        return "; ".join(f"{w.worker_id}: {_standstill(w.status)}" for w in workers if self.stalled(w.status))


def _standstill(status: WorkerStatus) -> str:
    return f"no progress in '{status.phase}' for {status.phase_age_s:.0f} s"
