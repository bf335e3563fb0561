"""How long a rank's own part of a step takes, without what it waits for others."""

import time
from typing import Any

import torch


class Stopwatch:
    """Seconds per sample of this rank's own work in a step; on a GPU taken from events, so that nobody waits.

    With a reducer whose backward waits for other ranks only what lies outside the
    backwards counts, on all ranks alike: their ratios are what is wanted.
    """

    def __init__(self, device: torch.device, active: bool) -> None:
        self._cuda = device.type == "cuda"
        self._active = active
        self._seconds, self._samples, self._since = 0.0, 0, -1.0
        self._events: list[Any] = []

    def begin(self) -> float:
        """A new step begins, and the clock runs; seconds per sample of the step before (0: unknown)."""
        if not self._active:
            return 0.0
        if self._events:
            # The step before has ended with the host waiting for its gradient norm.
            starts, stops = self._events[0::2], self._events[1::2]
            pairs = zip(starts, stops, strict=False)
            self._seconds = sum(a.elapsed_time(b) for a, b in pairs if b.query()) / 1e3
        found = self._seconds / self._samples if self._samples else 0.0
        self._seconds, self._samples, self._events = 0.0, 0, []
        self.start()
        return found

    def start(self) -> None:
        """Let the clock run."""
        if self._cuda and self._active:
            self._mark()
        else:
            self._since = time.perf_counter()

    def stop(self, samples: int = 0) -> None:
        """Halt the clock; `samples` were worked on meanwhile."""
        self._samples += samples
        if self._cuda and self._active:
            self._mark()
        else:
            self._seconds += time.perf_counter() - self._since

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)
