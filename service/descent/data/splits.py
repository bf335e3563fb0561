"""Which samples are held out: pure functions of (length, share, seed).

`rows_of` splits a table that is read whole, by a list of row numbers. `hold_out` and `split` make
views on a data set of any length without a list: the samples are cut into as many equal stretches as
samples are held out, and a keyed hash chooses one sample of each stretch. So the order is kept
(neighbours in a shard stay neighbours), and the i-th sample of a part is found by arithmetic alone.
"""

from dataclasses import dataclass, replace

import numpy as np

from descent.data.base import (
    Data,
    Indices,
    Pair,
    View,
    check_indices,
    digest_of,
)
from descent.data.layout import Layout
from descent.errors import DataError

SPLITS = ("train", "evaluate", "all")
_LISTED = 1 << 22
"""A part of at most this many samples keeps a list of them after all: 32 MB, for cheaper look-ups."""
_LONGEST = 1 << 31


# -- by a list of rows -----------------------------------------------------------------


def held_count(length: int, share: float, key: str) -> int:
    """How many of `length` samples a share is. Raises DataError, naming `key`, where one part would be empty."""
    if not 0.0 < share < 1.0:
        raise DataError(f"{key}={share}: give a share between 0 and 1, such as 0.1")
    count = int(length * share + 0.5)
    if 1 <= count < length:
        return count
    empty = "evaluate" if count < 1 else "train"
    remedy = f"choose a share from {1 / max(1, length):.3g} to {1 - 1 / max(1, length):.3g}"
    if length < 2:
        remedy = "at least 2 samples are needed"
    raise DataError(f"{key}={share} of {length} samples leaves none to {empty} on: {remedy}")


def split_indices(length: int, holdout: float, seed: int) -> tuple[Indices, Indices]:
    """The numbers of the samples to train on, and of those to evaluate on, each ascending.

    The raw output of PCG64 is the part of NumPy's random numbers that is promised to stay the same
    across versions and machines; hence an argsort of it, and not a shuffle.

    >>> train, evaluate = split_indices(10, 0.2, seed=0)
    >>> len(train), len(evaluate), sorted({*train.tolist(), *evaluate.tolist()}) == list(range(10))
    (8, 2, True)
    """
    num_held = held_count(length, holdout, "data.holdout")
    if seed < 0:
        raise DataError(f"seed={seed} of the split: give 0 or more")
    order = np.argsort(np.random.PCG64(seed).random_raw(length), kind="stable").astype(np.int64)
    return np.sort(order[num_held:]), np.sort(order[:num_held])


def check_split(name: str, chosen: str, allowed: tuple[str, ...] = SPLITS) -> None:
    """Raise DataError for a `split` argument that the data set `name` doesn't know."""
    if chosen not in allowed:
        raise DataError(f"{name}: split={chosen!r} is none of {', '.join(allowed)}")


def rows_of(length: int, chosen: str, holdout: float, seed: int) -> Indices:
    """The numbers of the samples in one split: 'train', 'evaluate' or 'all'."""
    check_split("data", chosen)
    if chosen == "all":
        return np.arange(length, dtype=np.int64)
    return split_indices(length, holdout, seed)[SPLITS.index(chosen)]


# -- without a list --------------------------------------------------------------------


def _mix(numbers: Indices, seed: int) -> Indices:
    """63 well-mixed bits of each number (splitmix64's finalizer; Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = numbers.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


@dataclass(frozen=True)
class Strata:
    """The choice of `held` out of `length` samples, one from each of `held` equal stretches.

    >>> strata = Strata(10, 3, seed=0)
    >>> both = [*strata.held_out(np.arange(3)), *strata.kept(np.arange(7))]
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
        """The i-th held-out samples, ascending in i."""
        return self._chosen(np.asarray(i, dtype=np.int64))

    def kept(self, i: Indices) -> Indices:
        """The i-th of the other samples, ascending in i."""
        i = np.asarray(i, dtype=np.int64)
        kept = self.length - self.held
        # Stretch j begins after floor(j * kept / held) kept samples: take the last j for which that is <= i.
        stretch = ((i + 1) * self.held - 1) // kept
        at = stretch * self.length // self.held + i - stretch * kept // self.held
        return at + (at >= self._chosen(stretch))

    def kept_before(self, position: int) -> int:
        """How many kept samples lie before sample `position`."""
        if position >= self.length:
            return self.length - self.held
        stretch = ((position + 1) * self.held - 1) // self.length
        before = stretch + int(self._chosen(np.array([stretch]))[0] < position)
        return position - before


class Part(View):
    """The held-out samples of a data set (`held`), or the others."""

    def __init__(self, data: Data, strata: Strata, held: bool) -> None:
        super().__init__(data)
        self.strata, self.held = strata, held
        self._length = strata.held if held else strata.length - strata.held
        self._listed = self._find(np.arange(self._length)) if self._length <= _LISTED else None
        self.layout = _layout_of_part(data.layout, strata, held)

    def _find(self, i: Indices) -> Indices:
        return self.strata.held_out(i) if self.held else self.strata.kept(i)

    def parent_indices(self, indices: Indices) -> Indices:
        """The samples' numbers in the whole data set; raises IndexError outside this part."""
        if self._listed is not None:
            return self._listed[indices]
        check_indices(indices, self._length)
        return self._find(indices)

    @property
    def digest(self) -> str:
        return digest_of([], f"{self.strata} {self.held}", self.data.digest)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Pair:
        if not -self._length <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        return self.data[int(self.parent_indices(np.array([index % self._length]))[0])]


def _layout_of_part(layout: Layout | None, strata: Strata, held: bool) -> Layout | None:
    """The same shards with the fewer samples that a part has in each."""
    if layout is None:
        return None
    kept = np.array([strata.kept_before(int(s)) for s in layout.starts], dtype=np.int64)
    return replace(layout, starts=layout.starts - kept if held else kept)


def hold_out(data: Data, share: float, seed: int, key: str = "data.holdout") -> tuple[Part, Part]:
    """(others, held out): disjoint views that together are the whole data set.

    The choice depends on (len(data), share, seed) only. Raises DataError when one part would be empty.
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
    # `holdout` is a share of the whole data set, as `test` is.
    share = held_count(len(data), holdout, "data.holdout") / len(rest)
    if share >= 1.0:
        raise DataError(f"data.holdout={holdout} and data.test={test} leave nothing to train on")
    train, evaluate = hold_out(rest, share, seed)
    return train, evaluate, tested
