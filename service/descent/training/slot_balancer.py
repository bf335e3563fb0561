"""Which rank computes which slots: evenly at first, then by measured speed. Pure functions and a short memory."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from descent.messages import Notice

Shares = tuple[tuple[int, int], ...]
"""Per rank the half-open range of slots that the rank computes."""

_WINDOW, _WINDOW_S = 5, 0.25
"""At least so many steps, and so many seconds, between two decisions; a speed is a median over these steps."""
_GAIN = 0.85
"""The slots are assigned anew where the slowest rank is expected to need at most this share of its time."""
_MOST_LOOKS = 64
"""At most so many looks in a row must ask for other shares before they change."""


def assign_slots(slots: int, world_size: int) -> Shares:
    """Contiguous ranges of slots per rank, as even as can be.

    >>> assign_slots(4, 3)
    ((0, 1), (1, 2), (2, 4))
    """
    return tuple((slots * r // world_size, slots * (r + 1) // world_size) for r in range(world_size))


def assign_by_speed(slots: int, seconds: Sequence[float]) -> Shares:
    """Contiguous ranges, at least one slot each, that minimize the slowest rank's time.

    seconds: each rank's time for one slot. The slots go one by one to the rank that would be
    done first with one more, which is optimal for equal slots.

    >>> assign_by_speed(6, [1.0, 1.0, 2.0])
    ((0, 2), (2, 5), (5, 6))
    """
    counts = [1] * len(seconds)
    for _ in range(slots - len(seconds)):
        # Of two ranks that would be done at the same time the later one: so ranks of equal
        # speed get what `assign_slots` gives them, the larger shares at the end.
        done = [((n + 1) * s, -rank) for rank, (n, s) in enumerate(zip(counts, seconds, strict=True))]
        counts[-min(done)[1]] += 1
    ends = [sum(counts[: rank + 1]) for rank in range(len(counts))]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def slowest_time(shares: Shares, seconds: Sequence[float]) -> float:
    """The time of the slowest rank; `seconds` is each rank's time for one slot."""
    return max((hi - lo) * s for (lo, hi), s in zip(shares, seconds, strict=True))


@dataclass
class SlotBalancer:
    """Each rank's view of all ranks' speeds in one generation. All see the same numbers, so all decide the same."""

    shares: Shares
    """Per rank its slots, as they are now."""
    slots: int
    may_move: bool
    """Whether slots may be assigned anew (`straggler.balance`)."""
    factor: float
    """A rank is slow when its seconds per sample are this many times the median."""
    after_s: float
    """A rank that has been slow for so many seconds is a straggler."""
    ratio: float = 0.0
    """The slowest rank's seconds per sample over the median; 0 until it is known."""
    straggler: int | None = None
    """The rank that became a straggler with the step that was observed last; each rank is named once."""
    _observed: list[Sequence[float]] = field(default_factory=list)
    _slow_since: dict[int, float] = field(default_factory=dict)
    _named: set[int] = field(default_factory=set)
    _since: float = 0.0
    _warm: bool = False
    _asked: int = 0
    """Looks in a row that have asked for other shares."""
    _looks_needed: int = 1

    def observe(self, seconds: Sequence[float], now: float) -> Shares | None:
        """Take in a step's times; returns the new shares where assigning the slots anew pays, else None.

        seconds: each rank's seconds per sample, 0 where a rank has not measured yet. now: one clock for
        all ranks, in seconds.
        """
        self.straggler = None
        if min(seconds) <= 0.0:
            return None
        self._observed.append(seconds)
        if len(self._observed) == 1:
            self._since = now
        if len(self._observed) < _WINDOW or now - self._since < _WINDOW_S:
            return None
        # The median, so that one slow step (a page fault, a garbage collection) moves nothing.
        speeds = [statistics.median(column) for column in zip(*self._observed, strict=True)]
        self._observed = []
        if not self._warm:  # a generation's first steps allocate and compile
            self._warm = True
            return None
        self._look_for_stragglers(speeds, now)
        return self._moved(speeds) if self.may_move and self.slots > len(self.shares) else None

    def _look_for_stragglers(self, speeds: Sequence[float], now: float) -> None:
        # Of two ranks the faster one is the measure.
        usual = statistics.median_low(speeds)
        self.ratio = max(speeds) / usual
        for rank, seconds in enumerate(speeds):
            if seconds <= self.factor * usual:
                self._slow_since.pop(rank, None)
            elif now - self._slow_since.setdefault(rank, now) >= self.after_s:
                if rank not in self._named:
                    self._named.add(rank)
                    self.straggler = rank

    def _moved(self, speeds: Sequence[float]) -> Shares | None:
        """The shares that pay at these speeds, once enough looks in a row have asked for a change.

        The first change needs one look, each later one twice as many as the one before: ranks whose speeds
        take turns would otherwise pass the same slots to and fro for the whole run.
        """
        wanted = assign_by_speed(self.slots, speeds)
        if slowest_time(wanted, speeds) > _GAIN * slowest_time(self.shares, speeds):
            self._asked = 0
            return None
        self._asked += 1
        if self._asked < self._looks_needed:
            return None
        self._asked, self._looks_needed = 0, min(2 * self._looks_needed, _MOST_LOOKS)
        self.shares = wanted
        return wanted


def rebalanced(step: int, generation: int, shares: Shares) -> Notice:
    """The notice that the slots were assigned anew after `step`; every rank sends it."""
    counts = ", ".join(str(hi - lo) for lo, hi in shares)
    detail = f"slots per rank, by speed: {counts}"
    return Notice("slots assigned", step, generation, None, detail, {"shares": shares})


def straggling(step: int, generation: int, rank: int, ratio: float) -> Notice:
    """The notice that `rank` has been slow for long; every rank sends it."""
    detail = f"rank {rank} needs {ratio:.1f} times the usual time per sample"
    return Notice("straggler", step, generation, rank, detail, {"ratio": ratio})
