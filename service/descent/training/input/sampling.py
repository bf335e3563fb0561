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
from descent.training.input.permutation import permute as permute
from descent.training.input.permutation import stream_seed as stream_seed
from descent.training.input.samplers import EpochOrder

Indices = NDArray[np.int64]
_BLOCK = 1 << 14


def order(start: int, stop: int, n: int, seed: int, epoch_order: EpochOrder | None = None) -> Indices:
    """The samples at positions start … stop-1 of the endless sequence of epochs.

    epoch_order: the samples of an epoch; None: each of the n samples once, shuffled.
    """
    pieces = []
    while start < stop:
        epoch, offset = divmod(start, n)
        count = min(stop - start, n - offset)
        positions, key = np.arange(offset, offset + count), stream_seed(seed, epoch)
        if epoch_order is None:
            pieces.append(permute(positions, n, key))
        else:
            pieces.append(epoch_order.samples(positions, key, epoch))
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

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        layout: Layout | None = None,
        epoch_order: EpochOrder | None = None,
    ) -> None:
        """layout: of a data set that is read shard by shard. epoch_order: that of `data.sampler`, where there is one."""
        self._epoch_order = epoch_order
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self._stream = None if layout is None else ShardStream(layout, seed)
        self._steps_per_block = max(1, min(_BLOCK, 4 * num_samples) // batch_size)
        self._block = -1
        self._indices: Indices = np.empty(0, np.int64)

    @classmethod
    def of(cls, data: Data, batch_size: int, seed: int, epoch_order: EpochOrder | None = None) -> "SampleOrder":
        """The order for a data set: shard by shard where it has a layout."""
        return cls(len(data), batch_size, seed, data.layout, epoch_order)

    def samples_of(self, step: int) -> Indices:
        """The sample numbers of step >= 1, [batch_size]."""
        assert step >= 1, "step 0 is the initial state and has no samples"
        block, row = divmod(step - 1, self._steps_per_block)
        if block != self._block:
            start = block * self._steps_per_block * self.batch_size
            stop = start + self._steps_per_block * self.batch_size
            if self._stream is None:
                self._indices = order(start, stop, self.num_samples, self.seed, self._epoch_order)
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
