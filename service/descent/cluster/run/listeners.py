"""The controller's listener: passes a run's progress on to the display and to tracking."""

import time
from typing import TYPE_CHECKING

from descent.cluster.run.display import Display
from descent.messages import ClusterRecord, Incident, Record, StepRecord, TrainingRecord

if TYPE_CHECKING:
    from descent.tracking import Tracker


class ListenerGroup:
    """Calls the display and the tracker for everything that the controller reports."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.tracker: Tracker | None = None
        self._held: list[Record] = []
        self._incidents = 0
        self.first_step_at: float | None = None

    def attach(self, tracker: "Tracker") -> None:
        """From now on records go to tracking; those that came before follow at once."""
        self.tracker = tracker
        for record in self._held:
            tracker.log_metrics(record.step, record.metrics, record.time_ms)
        self._held.clear()

    def record(self, record: TrainingRecord, world_size: int) -> None:
        if self.first_step_at is None and isinstance(record, StepRecord):
            self.first_step_at = record.time_ms / 1000
        self.display.record(record, world_size)
        self._log(record)

    def _log(self, record: Record) -> None:
        if self.tracker is None:
            self._held.append(record)
        else:
            self.tracker.log_metrics(record.step, record.metrics, record.time_ms)

    def incident(self, incident: Incident) -> None:
        self.display.incident(incident)
        self._incidents += 1
        count = {"cluster/incidents": float(self._incidents)}
        self._log(ClusterRecord(incident.step, count, incident.time_ms))

    def world(self, generation: int, world_size: int, step: int) -> None:
        self.display.world(generation, world_size, step)
        size = {"cluster/world_size": float(world_size), "cluster/generation": float(generation)}
        self._log(ClusterRecord(step, size, int(time.time() * 1000)))

    def note(self, line: str) -> None:
        self.display.note(line)

    def tick(self) -> None:
        self.display.tick()
