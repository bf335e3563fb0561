"""The clock of a run's controller: the system's, or one that a test moves."""

import time
from typing import Protocol


class Clock(Protocol):
    """The two clocks that the controller and its parts read; the module `time` is one."""

    def monotonic(self) -> float:
        """Seconds since any fixed moment; never set back. For durations and deadlines."""
        ...

    def time(self) -> float:
        """Unix time in seconds. For what is written down."""
        ...


SYSTEM_CLOCK: Clock = time
