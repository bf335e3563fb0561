"""Who computes which slots: evenly at first, then by measured speed. Pure functions and their little memory."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from descent.messages import Notice

Shares = tuple[tuple[int, int], ...]
"""Per rank the half-open range of slots that it computes."""

_WINDOW, _WINDOW_S = 5, 0.25
"""At least so many steps and seconds between two looks at the speeds: each is a median over them."""
_GAIN = 0.85
"""Dealt anew where the slowest rank is expected to need at most this share of its time."""


def assign_slots(slots: int, world_size: int) -> Shares:
    """Contiguous ranges of slots per rank, as even as can be.

    >>> assign_slots(4, 3)
    ((0, 1), (1, 2), (2, 4))
    """
    return tuple((slots * r // world_size, slots * (r + 1) // world_size) for r in range(world_size))


def deal_by_speed(slots: int, seconds: Sequence[float]) -> Shares:
    """Contiguous ranges, at least one slot each, that minimize the slowest rank's time.

    seconds: per rank, for one slot. Slot by slot to whoever would be done first with it,
    which is optimal for equal parts.

    >>> deal_by_speed(6, [1.0, 1.0, 2.0])
    ((0, 2), (2, 5), (5, 6))
    """
    counts = [1] * len(seconds)
    for _ in range(slots - len(seconds)):
        # Of two that would be done at the same time the later one: so that an even
        # dealing comes out as `assign_slots` has it, with the larger shares behind.
        done = [((n + 1) * s, -rank) for rank, (n, s) in enumerate(zip(counts, seconds, strict=True))]
        counts[-min(done)[1]] += 1
    ends = [sum(counts[: rank + 1]) for rank in range(len(counts))]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def slowest_time(shares: Shares, seconds: Sequence[float]) -> float:
    """How long the slowest rank takes; `seconds` per rank for one slot."""
    return max((hi - lo) * s for (lo, hi), s in zip(shares, seconds, strict=True))


@dataclass
class SlotBalancer:
    """What all ranks of a generation know of each other's speed; all are told the same, so all decide the same."""

    shares: Shares
    slots: int
    deal: bool
    """Whether the slots may be dealt anew."""
    factor: float
    """A straggler's seconds per sample over the median."""
    after_s: float
    """For how long it must have been that slow."""
    ratio: float = 0.0
    """The slowest rank's seconds per sample over the median; 0: not known yet."""
    straggler: int | None = None
    """A rank that has been slow for long, once: at the step after which it became known."""
    _seen: list[Sequence[float]] = field(default_factory=list)
    _slow_since: dict[int, float] = field(default_factory=dict)
    _named: set[int] = field(default_factory=set)
    _since: float = 0.0
    _warm: bool = False

    def learn(self, seconds: Sequence[float], now: float) -> Shares | None:
        """Take note of the ranks' seconds per sample; the new shares where dealing anew pays.

        now: one clock for all ranks, in seconds.
        """
        self.straggler = None
        if min(seconds) <= 0.0:
            return None
        self._seen.append(seconds)
        if len(self._seen) == 1:
            self._since = now
        if len(self._seen) < _WINDOW or now - self._since < _WINDOW_S:
            return None
        # The median, so that a hiccup (a page fault, a collected generation) moves nothing.
        speeds = [statistics.median(column) for column in zip(*self._seen, strict=True)]
        self._seen = []
        if not self._warm:  # a generation's first steps allocate and compile
            self._warm = True
            return None
        self._look_for_stragglers(speeds, now)
        return self._dealt(speeds) if self.deal and self.slots > len(self.shares) else None

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

    def _dealt(self, speeds: Sequence[float]) -> Shares | None:
        wanted = deal_by_speed(self.slots, speeds)
        if slowest_time(wanted, speeds) > _GAIN * slowest_time(self.shares, speeds):
            return None
        self.shares = wanted
        return wanted


def dealt(step: int, generation: int, shares: Shares) -> Notice:
    """What all ranks tell when the slots were dealt anew after `step`."""
    counts = ", ".join(str(hi - lo) for lo, hi in shares)
    detail = f"slots per rank, by speed: {counts}"
    return Notice("slots dealt", step, generation, None, detail, {"shares": shares})


def straggling(step: int, generation: int, rank: int, ratio: float) -> Notice:
    """What all ranks tell of one that has been slow for long."""
    detail = f"rank {rank} needs {ratio:.1f} times the usual time per sample"
    return Notice("straggler", step, generation, rank, detail, {"ratio": ratio})
