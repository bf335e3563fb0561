"""When to write a checkpoint: every so many seconds, or as often as it pays.

A checkpoint every t seconds costs C / t of the time for the writing, where each holds the
training up for C seconds, and t / 2M for the steps that faults undo, where one fault comes in
M seconds on average. The sum is least at t = sqrt(2 C M): Young, "A first order approximation
to the optimum checkpoint interval", CACM 17(9), 1974.
"""

import math
import time

_PRIOR_S = 24 * 3600.0
"""The time between faults that is assumed at the start: a day."""
_LEAST_S = 5.0
_AGAIN_S = 30.0
"""The interval after a checkpoint that failed."""
_FIRST_COST_S = 1.0


def young(cost_s: float, between_faults_s: float) -> float:
    """The interval in seconds that loses least time to writing checkpoints and to repeating steps.

    >>> young(cost_s=2.0, between_faults_s=3600.0)
    120.0
    """
    return math.sqrt(2.0 * cost_s * between_faults_s)


def interval(cost_s: float, took_s: float, run_s: float, faults: int, share: float) -> float:
    """The cadence `auto`, in seconds.

    cost_s: how long a checkpoint holds the training up; took_s: how long until it is on disk;
    run_s: how long the run has lasted, with `faults` after which it went back to a checkpoint;
    share: the part of the time that checkpoints may hold the training up at most.
    """
    between_faults_s = (run_s + _PRIOR_S) / (faults + 1)
    return max(young(cost_s, between_faults_s), cost_s / share, took_s, _LEAST_S)


class Cadence:
    """Says when the next checkpoint is due. every_s: seconds, None for `auto`.

    Infinity where checkpoints go by steps: then only one that failed is repeated by time.
    """

    def __init__(self, every_s: float | None, share: float, now: float | None = None) -> None:
        self._every_s, self._share = every_s, share
        self._began = self._last = time.monotonic() if now is None else now
        self._cost_s = self._took_s = _FIRST_COST_S
        self._faults = 0
        self._failed = False

    def every_s(self, now: float) -> float:
        """The seconds between two checkpoints, as things stand."""
        every_s = self._every_s
        if every_s is None:
            run_s = now - self._began
            every_s = interval(self._cost_s, self._took_s, run_s, self._faults, self._share)
        return min(every_s, _AGAIN_S) if self._failed else every_s

    def due(self, now: float) -> bool:
        return now - self._last >= self.every_s(now)

    def requested(self, now: float) -> None:
        """Note that a checkpoint was requested from the workers."""
        self._last = now

    def committed(self, now: float, cost_s: float, took_s: float) -> None:
        """Note that a checkpoint, requested or not, is committed, and its costs: half the weight to those before."""
        self._last = now
        self._cost_s = (self._cost_s + cost_s) / 2
        self._took_s = (self._took_s + took_s) / 2
        self._failed = False

    def failed(self) -> None:
        """Note that the last checkpoint failed: the next one is due soon."""
        self._failed = True

    def restored(self) -> None:
        """Note that a fault made the run go back to a checkpoint."""
        self._faults += 1
