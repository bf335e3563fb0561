"""Listeners: the controller reports a run's progress to one, which shows or keeps it."""

import contextlib
import sys
from collections.abc import Callable
from typing import Protocol

from descent.messages import Incident, TrainingRecord


class Listener(Protocol):
    """What the controller calls: the display and the tracking in a run, a double of them in a test."""

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

    def line(self, line: str) -> None:
        """One line that tells of something that is no cause for concern."""
        ...

    def tick(self) -> None:
        """The controller has finished one turn; called several times a second."""
        ...


class GuardedListener:
    """Passes each call on to another listener, whose exceptions never reach the run.

    A listener only shows and keeps what happens: a closed terminal or a broken disk must not end a
    training. The first exception is reported with one line on stderr.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._reported = False

    def record(self, record: TrainingRecord, world_size: int) -> None:
        self._guarded(lambda: self._listener.record(record, world_size))

    def incident(self, incident: Incident) -> None:
        self._guarded(lambda: self._listener.incident(incident))

    def world(self, generation: int, world_size: int, step: int) -> None:
        self._guarded(lambda: self._listener.world(generation, world_size, step))

    def note(self, line: str) -> None:
        self._guarded(lambda: self._listener.note(line))

    def line(self, line: str) -> None:
        self._guarded(lambda: self._listener.line(line))

    def tick(self) -> None:
        self._guarded(self._listener.tick)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if not self._reported:
                self._reported = True
                line = " ".join(f"{type(error).__name__}: {error}".split())
                with contextlib.suppress(OSError, ValueError):  # stderr may be closed, too
                    print(f"the display or the tracking failed ({line}); training goes on", file=sys.stderr, flush=True)
