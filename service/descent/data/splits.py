"""Splits without a list: which samples are held out is a pure function of (length, share, seed).

The data set is cut into as many equal stretches as samples are held out, and one sample
of each, chosen by a keyed hash, is. So the order is kept (neighbours in a shard stay
neighbours), any part's i-th sample is found at once, and no list is held, whatever the length.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from descent.data.base import (
    Data,
    Indices,
    Pair,
    PartOf,
    Subset,
    check_inside,
    digest_of,
    held_count,
)
from descent.data.shards import Layout
from descent.errors import DataError

_LIST = 1 << 22
"""Up to so many samples a list is made after all: 32 MB, and a batch costs one look-up less."""
_LONGEST = 1 << 31


def _mix(numbers: Indices, seed: int) -> Indices:
    """63 well-mixed bits of each number (splitmix64's finalizer; Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = numbers.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


@dataclass(frozen=True)
class Strata:
    """`held` of `length` samples, one from each of `held` stretches.

    >>> part = Strata(10, 3, seed=0)
    >>> both = [*part.held_out(np.arange(3)), *part.kept(np.arange(7))]
    >>> sorted(int(i) for i in both) == list(range(10))
    True
    """

    length: int
    held: int
    seed: int

    def _chosen(self, stretch: Indices) -> Indices:
        start = stretch * self.length // self.held
        size = (stretch + 1) * self.length // self.held - start
        return start + _mix(stretch, self.seed) % size

    def held_out(self, i: Indices) -> Indices:
        """The i-th held-out samples, ascending."""
        return self._chosen(np.asarray(i, dtype=np.int64))

    def kept(self, i: Indices) -> Indices:
        """The i-th of the others, ascending."""
        i = np.asarray(i, dtype=np.int64)
        kept = self.length - self.held
        # stretch j begins after floor(j * kept / held) kept samples: the last j for which that is ≤ i
        stretch = ((i + 1) * self.held - 1) // kept
        at = stretch * self.length // self.held + i - stretch * kept // self.held
        return at + (at >= self._chosen(stretch))

    def kept_before(self, position: int) -> int:
        """How many kept samples lie before `position`."""
        if position >= self.length:
            return self.length - self.held
        stretch = ((position + 1) * self.held - 1) // self.length
        before = stretch + int(self._chosen(np.array([stretch]))[0] < position)
        return position - before


class Part(PartOf):
    """The held-out samples of a data set, or the others; nothing is copied."""

    def __init__(self, data: Data, strata: Strata, held: bool) -> None:
        self.data, self.strata, self.held = data, strata, held
        self._length = strata.held if held else strata.length - strata.held
        self._list = self._where(np.arange(self._length)) if self._length <= _LIST else None
        self.layout: Layout | None = _cut(getattr(data, "layout", None), strata, held)

    def _where(self, i: Indices) -> Indices:
        return self.strata.held_out(i) if self.held else self.strata.kept(i)

    def numbers(self, indices: Indices) -> Indices:
        """The samples' numbers in the whole data set; raises IndexError outside this part."""
        if self._list is not None:
            return self._list[indices]
        check_inside(indices, self._length)
        return self._where(indices)

    @property
    def digest(self) -> str:
        return digest_of([], f"{self.strata} {self.held}", self.data.digest)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Pair:
        if not -self._length <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        return self.data[int(self.numbers(np.array([index % self._length]))[0])]

    def gather(self, indices: Indices, **seeds: Any) -> Pair:
        return self.data.gather(self.numbers(indices), **seeds)


def _cut(layout: Layout | None, strata: Strata, held: bool) -> Layout | None:
    """The layout of a part: the same shards with fewer samples."""
    if layout is None:
        return None
    kept = np.array([strata.kept_before(int(s)) for s in layout.starts], dtype=np.int64)
    return replace(layout, starts=layout.starts - kept if held else kept)


def hold_out(data: Data, share: float, seed: int, key: str = "data.holdout") -> tuple[Part, Part]:
    """(others, held out): disjoint views that together are the whole data set.

    Depends on (len(data), share, seed) only. Raises DataError when one would be empty.
    """
    if seed < 0:
        raise DataError(f"seed={seed} of the split: give 0 or more")
    held = held_count(len(data), share, key)
    if len(data) > _LONGEST:
        raise DataError(f"{key}={share}: of over 2**31 samples; give data.evaluate a set of its own")
    strata = Strata(len(data), held, seed)
    return Part(data, strata, False), Part(data, strata, True)


def split(data: Data, holdout: float, test: float, seed: int) -> tuple[Data, Data | None, Data | None]:
    """(train, evaluate, test): disjoint views that together are the whole data set; None for a share of 0.

    The test part is split off first, so it is the same whatever `holdout` is.
    """
    rest, tested = hold_out(data, test, seed, "data.test") if test else (data, None)
    if not holdout:
        return rest, None, tested
    # of the whole, as the test's share is
    share = held_count(len(data), holdout, "data.holdout") / len(rest)
    if share >= 1.0:
        raise DataError(f"data.holdout={holdout} and data.test={test} leave nothing to train on")
    train, evaluate = hold_out(rest, share, seed)
    return train, evaluate, tested


def root_of(data: Any) -> Any:
    """The data set beneath the views."""
    while isinstance(data, Subset | Part):
        data = data.data
    return data


def numbers_in(data: Any, indices: Indices) -> Indices:
    """A view's samples as numbers in `root_of(data)`."""
    while isinstance(data, Subset | Part):
        indices, data = data.numbers(indices), data.data
    return indices
