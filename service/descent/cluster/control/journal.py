"""What is recorded of a run while it is under way: metrics, incidents, its status file, lines for the user.

Recording never ends a run and never loses a step: a full disk and a failing listener are survived where
they occur (`RunLog`, `ControlFile`, `GuardedListener`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from descent.cluster.clock import Clock
from descent.cluster.control.control_file import ControlFile
from descent.cluster.control.run_state import Breakage, Generation, RunState
from descent.cluster.record.incidents import IncidentLog
from descent.cluster.record.listener import GuardedListener, Listener
from descent.cluster.record.run_log import RunLog
from descent.cluster.workers.group import WorkerInfo
from descent.messages import Notice, StepRecord, TrainingRecord

_NO_FAULT = ("slots assigned", "stopped early")
"""Kinds of notices that are told, and are no incidents."""


class Journal:
    """Writes a run's course into its log, its incidents and its status file, and reports it to the listener."""

    def __init__(self, log: RunLog, listener: Listener, control_file: ControlFile, batch_size: int, clock: Clock):
        self.log, self._control_file = log, control_file
        self.listener = GuardedListener(listener)
        self.incidents = IncidentLog(log, self.listener.incident, batch_size, clock)

    def add_records(self, records: Iterable[TrainingRecord], generation: Generation) -> list[TrainingRecord]:
        """Log the records that are new, and return them; the first step after a regroup ends its incidents."""
        new = []
        for record in records:
            if self.log.is_new(record):
                self.log.append(record)
                self.listener.record(record, len(generation.members))
                if isinstance(record, StepRecord):
                    self._note_recovery(record, generation)
                new.append(record)
        return new

    def _note_recovery(self, record: StepRecord, generation: Generation) -> None:
        took_s = self.incidents.committed(record)
        if took_s is not None:
            world_size = len(generation.members)
            self.listener.line(
                f"recovered in {took_s:.2f} s: generation {generation.number}, {world_size} "
                f"worker{'s' if world_size != 1 else ''}, at step {record.step}"
            )

    def add_notice(self, notice: Notice, generation: Generation, workers: Mapping[str, WorkerInfo]) -> bool:
        """Record a notice of the ranks; False if another rank has reported it already."""
        if not self.incidents.is_new(notice):
            return False
        if notice.kind in _NO_FAULT:
            self.listener.line(f"step {notice.step}: {notice.detail}")
        else:
            self.incidents.notice(notice, {rank: (w, workers[w].host) for rank, w in enumerate(generation.members)})
        return True

    def add_loss(self, worker: WorkerInfo, step: int, detected_in_s: float | None) -> None:
        """A worker is dead. detected_in_s: seconds since a member's last answer; None if it was no member."""
        kind = "node lost" if worker.excused else "worker lost"
        about: dict[str, Any] = {"worker": worker.worker_id, "host": worker.host, "detail": worker.cause}
        if detected_in_s is not None:
            self.incidents.open(kind, step, detected_in_s=detected_in_s, **about)
        else:
            self.incidents.add(kind, step, **about)

    def add_breakage(self, breakage: Breakage | None, step: int) -> None:
        """A generation broke, or not; an incident, unless a lost worker is one already."""
        if breakage is not None and not self.incidents.recovering:
            self.incidents.open(breakage.kind, step, at_ms=breakage.time_ms, detail=breakage.detail)

    def generation_formed(self, generation: Generation, step: int) -> None:
        """A new generation goes on from `step`."""
        self.incidents.regrouped(step)
        if not generation.save_only:
            self.listener.world(generation.number, len(generation.members), step)

    def state_lost(self, step: int, checkpoint: str | None, checkpoint_step: int) -> None:
        """No worker holds the state of `step` any more; the run goes on from a checkpoint, or from its start."""
        line = f"going on from {checkpoint}" if checkpoint else "starting again: no checkpoint yet"
        self.listener.note(f"no worker holds the state any more: {line}")
        if not self.incidents.recovering:
            self.incidents.open("state lost", step)
        self.incidents.lost(step - max(checkpoint_step, 0))

    def show(self, run_state: str, state: RunState, group: Mapping[str, WorkerInfo], **more: Any) -> None:
        """Write the status file when it is due. more: further entries."""
        living = {w: group[w].host for w in state.generation.members if not group[w].dead}
        self._control_file.show(
            state=run_state,
            controller=str(state.state),
            step=state.committed,
            generation=state.generation.number,
            world_size=len(living),
            members=living,
            incidents=len(self.log.incidents),
            goodput=round(self.incidents.goodput, 4),
            **more,
        )
