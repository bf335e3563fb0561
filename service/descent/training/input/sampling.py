"""Which samples belong to which step: pure functions of (seed, step), without state and without a list.

The order of an epoch is a keyed bijection on 0 … n-1, computed for the positions that are needed. So it
takes no memory whatever n is, and the samples of any step of any epoch can be computed at once.
Step s (the first is 1) takes the positions (s-1)*batch … s*batch-1 of the endless sequence epoch 0,
epoch 1, …: every step is full, and over an epoch each sample comes up exactly once, also where the batch
doesn't divide n.

A data set that is read shard by shard has a `Layout`. Then an epoch shuffles the shards, lays them end
to end, and shuffles the samples inside each window of that stream: a stretch of steps needs few shards,
and these are known ahead.
"""

import numpy as np
from numpy.typing import NDArray

from descent.data.base import Data
from descent.data.layout import Layout

Indices = NDArray[np.int64]
_ROUNDS = 4
_BLOCK = 1 << 14


def _scramble(x: NDArray[np.uint64], key: np.uint64, mask: np.uint64) -> NDArray[np.uint64]:
    """The function of a Feistel round: multiplications by the odd `key`, of which the well-mixed upper bits count.

    Multiply-shift hashing (Dietzfelbinger et al. 1997). A round needs nothing better, since rounds are
    repeated; and every step computes it.
    """
    out = x + (key >> np.uint64(7))
    out *= key
    out ^= out >> np.uint64(29)
    out *= key
    out >>= np.uint64(32)
    out &= mask
    return out


def stream_seed(seed: int, *path: int) -> int:
    """A 63-bit seed for the random stream that `path` names, for example (step, slot).

    >>> stream_seed(0, 1, 0) == stream_seed(0, 1, 0), stream_seed(0, 1, 0) == stream_seed(0, 0, 1)
    (True, False)
    """
    mask = (1 << 64) - 1
    x = seed & mask
    for part in path:
        x = (x + 0x9E3779B97F4A7C15 * (part + 1)) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return x >> 1


def permute(positions: Indices, n: int, key: int) -> Indices:
    """The images of `positions` under a keyed bijection on 0 … n-1.

    A Feistel network (Luby and Rackoff 1988) permutes the smallest power of two that is at least n. An
    image outside 0 … n-1 is permuted again until it falls inside (cycle walking, Black and Rogaway 2002),
    fewer than twice on average.

    >>> sorted(permute(np.arange(10), 10, key=7).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    if n <= 2:
        return (positions ^ (key & 1)) % n if n == 2 else np.zeros_like(positions)
    bits = (n - 1).bit_length()
    low = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = [np.uint64(2 * stream_seed(key, r) + 1) for r in range(2 * _ROUNDS)]

    def once(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> low, x & low_mask
        for r in range(_ROUNDS):
            left ^= _scramble(right, keys[2 * r], high_mask)
            right ^= _scramble(left, keys[2 * r + 1], low_mask)
        return (left << low) | right

    # For much of the domain, all of it is computed in one call and then looked up: a NumPy call has a fixed cost.
    whole = once(np.arange(1 << bits, dtype=np.uint64)) if 2 * len(positions) >= n else None
    x = once(positions.astype(np.uint64)) if whole is None else whole[positions]
    while (outside := np.flatnonzero(x >= np.uint64(n))).size:
        x[outside] = once(x[outside]) if whole is None else whole[x[outside]]
    return x.astype(np.int64)


def order(start: int, stop: int, n: int, seed: int) -> Indices:
    """The samples at positions start … stop-1 of the endless sequence of epochs."""
    pieces = []
    while start < stop:
        epoch, offset = divmod(start, n)
        count = min(stop - start, n - offset)
        pieces.append(permute(np.arange(offset, offset + count), n, stream_seed(seed, epoch)))
        start += count
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class ShardEpoch:
    """One epoch of a data set in shards: the shuffled shards laid end to end. Takes memory for the shards only."""

    def __init__(self, layout: Layout, seed: int, epoch: int) -> None:
        self._layout, self._key = layout, stream_seed(seed, epoch)
        sizes = np.diff(layout.starts)
        self._shards = permute(np.arange(len(sizes)), len(sizes), stream_seed(self._key, 0))
        self._cuts = np.concatenate([[0], np.cumsum(sizes[self._shards])])
        self._num_samples = int(self._cuts[-1])

    def _window(self, number: int) -> tuple[int, int]:
        start = number * self._layout.window
        return start, min(start + self._layout.window, self._num_samples)

    def samples(self, start: int, stop: int) -> Indices:
        """The samples at positions start … stop-1 of the epoch."""
        width = self._layout.window
        pieces = []
        for number in range(start // width, -(-stop // width)):
            lo, hi = self._window(number)
            inside = np.arange(max(start, lo) - lo, min(stop, hi) - lo)
            pieces.append(lo + permute(inside, hi - lo, stream_seed(self._key, 1, number)))
        stream = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        places = np.searchsorted(self._cuts, stream, side="right") - 1
        return self._layout.starts[self._shards[places]] + stream - self._cuts[places]

    def shards_near(self, position: int) -> Indices:
        """The shards of the window at `position` and of the next one, in the order of the stream."""
        lo, hi = self._window(position // self._layout.window)
        hi = min(hi + self._layout.window, self._num_samples)
        first, last = np.searchsorted(self._cuts, [lo, hi - 1], side="right") - 1
        return self._shards[first : last + 1]


class ShardStream:
    """The endless sequence of epochs of a data set in shards; the last few epochs are cached."""

    def __init__(self, layout: Layout, seed: int) -> None:
        self.layout, self._seed = layout, seed
        self._epochs: dict[int, ShardEpoch] = {}

    def epoch(self, number: int) -> ShardEpoch:
        if number not in self._epochs:
            if len(self._epochs) > 3:
                self._epochs.clear()
            self._epochs[number] = ShardEpoch(self.layout, self._seed, number)
        return self._epochs[number]

    def order(self, start: int, stop: int) -> Indices:
        """The samples at positions start … stop-1."""
        n = int(self.layout.starts[-1])
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, n)
            count = min(stop - start, n - offset)
            pieces.append(self.epoch(epoch).samples(offset, offset + count))
            start += count
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class SampleOrder:
    """The samples of each step. The samples of many steps are computed together, so that a small batch costs little."""

    def __init__(self, num_samples: int, batch_size: int, seed: int, layout: Layout | None = None) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self._stream = None if layout is None else ShardStream(layout, seed)
        self._steps_per_block = max(1, min(_BLOCK, 4 * num_samples) // batch_size)
        self._block = -1
        self._indices: Indices = np.empty(0, np.int64)

    @classmethod
    def of(cls, data: Data, batch_size: int, seed: int) -> "SampleOrder":
        """The order for a data set: shard by shard where it has a layout."""
        return cls(len(data), batch_size, seed, data.layout)

    def samples_of(self, step: int) -> Indices:
        """The sample numbers of step >= 1, [batch_size]."""
        assert step >= 1, "step 0 is the initial state and has no samples"
        block, row = divmod(step - 1, self._steps_per_block)
        if block != self._block:
            start = block * self._steps_per_block * self.batch_size
            stop = start + self._steps_per_block * self.batch_size
            if self._stream is None:
                self._indices = order(start, stop, self.num_samples, self.seed)
            else:
                self._indices = self._stream.order(start, stop)
            self._block = block
        return self._indices[row * self.batch_size : (row + 1) * self.batch_size]

    def shards_near(self, step: int) -> tuple[int, Indices] | None:
        """(number of the window that the step ends in, shards of this window and the next); None without a layout."""
        if self._stream is None:
            return None
        epoch, position = divmod(step * self.batch_size - 1, self.num_samples)
        window = self._stream.layout.window
        number = epoch * -(-self.num_samples // window) + position // window
        return number, self._stream.epoch(epoch).shards_near(position)


def slot_bounds(batch_size: int, slots: int) -> list[tuple[int, int]]:
    """The half-open range of the global batch that belongs to each slot; sizes differ by one at most.

    >>> slot_bounds(10, 4)
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    return [(batch_size * s // slots, batch_size * (s + 1) // slots) for s in range(slots)]
