"""The one object that a trainer shares with other threads: requests in, progress and records out."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from descent.errors import TrainingError
from descent.messages import Fault, Notice, ShareWritten, TrainingRecord
from descent.training.faults import Target, strike

PAUSE, SAVE = 0, 1
"""Indices of the votes that each rank casts in a step: to pause after it, to write a checkpoint after it."""
REPLACED = 2
"""Index, beside the votes, of the number of bad records that were replaced by good ones since the last step."""


class TooManyBadSteps(TrainingError):
    """Several steps in a row without finite gradients."""


class OutOfMemory(Exception):
    """A micro-batch didn't fit into memory; the next generation runs smaller ones."""


@dataclass
class Control:
    """Requests to a trainer and its progress. Each field is replaced as a whole or is a thread-safe deque."""

    abort: threading.Event = field(default_factory=threading.Event)
    pause: bool = False
    save: bool = False
    step: int = 0
    evaluated: int = -1
    phase: str = "starting"
    phase_since: float = field(default_factory=time.monotonic)
    records: deque[TrainingRecord] = field(default_factory=deque)
    shares: deque[ShareWritten] = field(default_factory=deque)
    notices: deque[Notice] = field(default_factory=deque)
    useful_s: float = 0.0
    """Seconds spent in steps that were committed."""
    diverged: tuple[int, ...] = ()
    """After "diverged": the ranks of that generation whose state is not the majority's."""
    notify: Callable[[], None] = lambda: None
    faults: list[Fault] = field(default_factory=list)
    """To be injected, in tests and by `descent chaos`; otherwise empty."""
    target: Target = field(default_factory=Target)

    def enter(self, phase: str) -> None:
        """Note that the training thread begins a phase; in tests and chaos, let the faults due in it strike."""
        self.phase_since = time.monotonic()
        self.phase = phase
        if self.faults:
            for fault in strike(self.faults, phase, self.step, self.target):
                generation = self.target.generation
                self.notices.append(Notice("injected", self.step + 1, generation, detail=fault.kind))
