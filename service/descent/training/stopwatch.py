"""How long a rank's own part of a step takes, without the time in which it waits for other ranks."""

import time

import torch


class Stopwatch:
    """Measures the seconds per sample of this rank's own work in a step; on a GPU by events, so that nothing waits.

    A reducer whose backward waits for other ranks (DDP's) halts the clock for its backwards, on all
    ranks alike: only the ratios of the ranks' times are used.
    """

    def __init__(self, device: torch.device, active: bool) -> None:
        """active: False where nobody asks for the times, as with a single rank."""
        self._cuda = device.type == "cuda"
        self._active = active
        self._running = False
        self._seconds, self._samples, self._since = 0.0, 0, -1.0
        self._events: list[torch.cuda.Event] = []

    def begin_step(self) -> float:
        """Start the clock for a new step. Returns the seconds per sample of the step before, 0 where unknown."""
        if not self._active:
            return 0.0
        if self._events:
            # The step before has ended with the host waiting for its gradient norm.
            starts, stops = self._events[0::2], self._events[1::2]
            pairs = zip(starts, stops, strict=False)
            self._seconds = sum(a.elapsed_time(b) for a, b in pairs if b.query()) / 1e3
        found = self._seconds / self._samples if self._samples else 0.0
        self._seconds, self._samples, self._events, self._running = 0.0, 0, [], False
        self.resume()
        return found

    def resume(self) -> None:
        """Let the clock run on."""
        if self._active and not self._running:
            self._running = True
            self._mark()

    def halt(self) -> None:
        """Stop the clock for a while."""
        if self._active and self._running:
            self._running = False
            self._mark()

    def stop(self, samples: int) -> None:
        """Stop the clock: the step's own work on `samples` samples is done."""
        self._samples += samples
        self.halt()

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        elif self._running:
            self._since = time.perf_counter()
        else:
            self._seconds += time.perf_counter() - self._since
