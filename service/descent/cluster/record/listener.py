"""The listener: the one that the controller tells of a run's progress."""

from typing import Protocol

from descent.messages import Incident, TrainingRecord


class Listener(Protocol):
    """What the controller calls: the live display and the tracking, or a double of them in a test."""

    def record(self, record: TrainingRecord, world_size: int) -> None:
        """A step was committed, or an evaluation after it; `world_size`: replicas in the generation."""
        ...

    def incident(self, incident: Incident) -> None:
        """A fault was detected."""
        ...

    def world(self, generation: int, world_size: int, step: int) -> None:
        """A generation of `world_size` replicas was formed with `step` committed."""
        ...

    def note(self, line: str) -> None:
        """One line that the user should read."""
        ...

    def tick(self) -> None:
        """The controller has finished one round; called several times a second."""
        ...
