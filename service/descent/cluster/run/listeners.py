"""The controller's listener: passes a run's progress on to the display, to tracking and to the user's observers."""

import time

from descent.cluster.run.display import Display
from descent.cluster.run.observers import Observers
from descent.messages import ClusterRecord, Incident, Record, StepRecord, TrainingRecord
from descent.tracking import Tracker


class ListenerGroup:
    """Calls the display and the tracker for everything that the controller reports; see `record.listener.Listener`."""

    def __init__(self, display: Display, tracker: Tracker, observers: Observers | None = None) -> None:
        self.display, self.tracker, self._observers = display, tracker, observers
        self._incidents = 0
        self._first_world: ClusterRecord | None = None
        self.first_step_at: float | None = None
        """Unix time at which the first step was committed."""

    def record(self, record: TrainingRecord, world_size: int) -> None:
        """A step was committed, or an evaluation after it."""
        if self.first_step_at is None and isinstance(record, StepRecord):
            self.first_step_at = record.time_ms / 1000
        self.display.record(record, world_size)
        self._log(record)
        if self._observers is not None:
            self._observers.record(record, world_size)

    def _log(self, record: Record) -> None:
        metrics = {chart_name(name): value for name, value in record.metrics.items()}
        self.tracker.log_metrics(record.step, metrics, record.time_ms)

    def incident(self, incident: Incident) -> None:
        """A fault was detected."""
        self.display.incident(incident)
        self._incidents += 1
        count = {"cluster/incidents": float(self._incidents)}
        self._log(ClusterRecord(incident.step, count, incident.time_ms))

    def world(self, generation: int, world_size: int, step: int) -> None:
        """A generation was formed. The first one is logged when there is a second: one value alone is no chart."""
        self.display.world(generation, world_size, step)
        size = {"cluster/world_size": float(world_size), "cluster/generation": float(generation)}
        record = ClusterRecord(step, size, int(time.time() * 1000))
        if generation == 1:
            self._first_world = record
            return
        if self._first_world is not None:
            self._log(self._first_world)
            self._first_world = None
        self._log(record)

    def note(self, line: str) -> None:
        """One line that the user should read."""
        self.display.note(line)

    def line(self, line: str) -> None:
        """One line that tells of something that is no cause for concern."""
        self.display.line(line)

    def tick(self) -> None:
        """The controller has finished one round."""
        self.display.tick()


def chart_name(metric: str) -> str:
    """The metric's name in MLflow, whose page sorts charts by name: those of single layers and workers come last.

    >>> chart_name("grad/norm/layers.0"), chart_name("cluster/world_size"), chart_name("grad/norm")
    ('train/layer_gradients/layers.0', 'workers/world_size', 'grad/norm')
    """
    for prefix, shown in (("grad/norm/", "train/layer_gradients/"), ("cluster/", "workers/")):
        if metric.startswith(prefix):
            return shown + metric.removeprefix(prefix)
    return metric
