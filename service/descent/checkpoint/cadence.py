"""When to save: every so many seconds, or as often as it pays.

What a checkpoint every t seconds costs per second is C / t for the saves, each holding the
training up for C seconds, and t / 2M for what a fault undoes, one coming in M seconds on
average. The sum is least at t = sqrt(2 C M): Young, "A first order approximation to the
optimum checkpoint interval", CACM 17(9), 1974.
"""

import math
import time

_PRIOR_S = 24 * 3600.0
"""Before anything is known: one fault a day."""
_LEAST_S = 5.0
_AGAIN_S = 30.0
"""After a save that failed."""
_FIRST_COST_S = 1.0


def young(cost_s: float, between_faults_s: float) -> float:
    """The interval in seconds that loses least time to saving and to repeating.

    >>> young(cost_s=2.0, between_faults_s=3600.0)
    120.0
    """
    return math.sqrt(2.0 * cost_s * between_faults_s)


def interval(cost_s: float, took_s: float, run_s: float, faults: int, share: float) -> float:
    """The cadence `auto`, in seconds.

    cost_s: how long a save holds the training up; took_s: until it is on disk; run_s: how
    long the run has lasted, with `faults` that made it go back to a checkpoint; share: at
    most this part of the time may go into saving.
    """
    between_faults_s = (run_s + _PRIOR_S) / (faults + 1)
    return max(young(cost_s, between_faults_s), cost_s / share, took_s, _LEAST_S)


class Cadence:
    """Says when the next checkpoint is due. every_s: seconds, None for `auto`.

    Infinity where checkpoints don't go by time: then only one that failed is asked for again.
    """

    def __init__(self, every_s: float | None, share: float, now: float | None = None) -> None:
        self._every_s, self._share = every_s, share
        self._began = self._last = time.monotonic() if now is None else now
        self._cost_s = self._took_s = _FIRST_COST_S
        self._faults = 0
        self._failed = False

    def every_s(self, now: float) -> float:
        """The seconds between two checkpoints, as things stand."""
        found = self._every_s
        if found is None:
            run_s = now - self._began
            found = interval(self._cost_s, self._took_s, run_s, self._faults, self._share)
        return min(found, _AGAIN_S) if self._failed else found

    def due(self, now: float) -> bool:
        return now - self._last >= self.every_s(now)

    def asked(self, now: float) -> None:
        """A save was asked for."""
        self._last = now

    def saved(self, now: float, cost_s: float, took_s: float) -> None:
        """A save, asked for or not, is done, and what it cost; half the weight to those before."""
        self._last = now
        self._cost_s = (self._cost_s + cost_s) / 2
        self._took_s = (self._took_s + took_s) / 2
        self._failed = False

    def failed(self) -> None:
        """The last save came to nothing: try again soon."""
        self._failed = True

    def went_back(self) -> None:
        """A fault made the run go back to a checkpoint."""
        self._faults += 1
