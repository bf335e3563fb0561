"""Batches for the step: from the device or memory where the data lies there, else read ahead in the background."""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from descent.data.base import Data
from descent.data.records import Policy, read_good
from descent.data.splits import numbers_in, root_of
from descent.training.input.sampling import Indices, SampleOrder, stream_seed

_DEPTH = 4
_SHARE_OF_DEVICE = 8
"""A data set up to an eighth of the device's memory lies there; of its size, not of what is free: a run's bits must not depend on its neighbours."""
Pair = tuple[Tensor, Tensor]


class Feed:
    """Gives a step's micro-batches on the device.

    A data set in memory is indexed on the spot: handing a few microseconds of work to a
    thread would cost more than it saves. One that draws random numbers is read on the spot
    too, seeded by (step, sample), because it shares its generators with the model. Any
    other is read up to a step ahead, pinned and on its way to the device. Bad records go
    by `on_error` (see `descent.data.records.read_good`).

    order: None for a set that is only `take`n from.
    """

    def __init__(
        self,
        data: Data,
        order: SampleOrder | None,
        device: torch.device,
        *,
        seed: int = 0,
        on_error: Policy = "fail",
    ) -> None:
        self._data = data
        self._order = order
        self._device = device
        self._seed, self._on_error = seed, on_error
        self._root: Any = root_of(data)
        self._random = bool(getattr(self._root, "random", False))
        self._resident = _on_device(self._root, device)
        near = getattr(self._root, "in_memory", False) or self._resident is not None
        readers = getattr(self._root, "readers", 1)
        self._ahead = None if near or self._random else ThreadPoolExecutor(readers, "feed")
        self._stream = torch.cuda.Stream(device) if self._ahead is not None and device.type == "cuda" else None
        self._queue: deque[tuple[int, int, int]] = deque()
        self._waiting: dict[tuple[int, int, int], Future[_Read]] = {}
        self._window = -1
        self._waited_s = 0.0
        self._replaced = 0

    def numbers(self, indices: Indices) -> Indices:
        """The samples' numbers in the data set as it is stored, before any split."""
        return numbers_in(self._data, indices)

    def take(self, indices: Indices, step: int = 0) -> Pair:
        """The samples `indices`: inputs [n, …] and targets [n, …] on the device."""
        begin = time.perf_counter()
        read = self._read(indices, step)
        self._replaced += read.replaced
        pair = read.to(self._device)
        self._waited_s += time.perf_counter() - begin
        return pair

    def prepare(self, step: int, slots: Sequence[tuple[int, tuple[int, int]]], micro_size: int) -> None:
        """Say what this step will fetch, so that it and the next step's first reads run ahead."""
        self._expect(step)
        if self._ahead is None:
            return
        pieces = [(f, min(f + micro_size, hi)) for _, (lo, hi) in slots for f in range(lo, hi, micro_size)]
        known = {*self._waiting, *self._queue}
        for wanted in (step, step + 1):
            self._queue.extend(key for p in pieces if (key := (wanted, *p)) not in known)
        self._fill()

    def _expect(self, step: int) -> None:
        """Tell a data set in shards which ones come next, once a window."""
        near = None if self._order is None else self._order.shards_near(step)
        if near is not None and near[0] != self._window:
            self._window = near[0]
            self._root.expect(near[1])

    def _fill(self) -> None:
        """Keep a few reads under way; a bound, because a global batch may be larger than memory."""
        assert self._ahead is not None and self._order is not None
        while self._queue and len(self._waiting) < _DEPTH:
            key = self._queue.popleft()
            indices = self._order.samples_of(key[0])[key[1] : key[2]]
            self._waiting[key] = self._ahead.submit(self._read_ahead, indices, key[0])

    def fetch(self, step: int, first: int, stop: int) -> Pair:
        """Samples first … stop-1 of the step's global batch."""
        assert self._order is not None
        future = self._waiting.pop((step, first, stop), None)
        if future is None:
            return self.take(self._order.samples_of(step)[first:stop], step)
        begin = time.perf_counter()
        self._fill()
        read = future.result()
        self._replaced += read.replaced
        pair = read.to(self._device)
        self._waited_s += time.perf_counter() - begin
        return pair

    def forget(self) -> None:
        """Drop what was read ahead: the next generation may deal the slots anew."""
        for future in self._waiting.values():
            future.cancel()
        self._waiting.clear()
        self._queue.clear()

    def waited_s(self) -> float:
        """Seconds that the step has waited for data since this was last asked."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def replaced(self) -> int:
        """Bad records replaced since this was last asked."""
        count, self._replaced = self._replaced, 0
        return count

    def _read(self, indices: Indices, step: int) -> "_Read":
        if self._resident is not None:
            return _Read(self._from_device(numbers_in(self._data, indices)), 0)

        def read(wanted: Indices) -> Pair:
            if not self._random:
                return self._data.gather(wanted)
            seeds = [stream_seed(self._seed, step, sample) for sample in wanted.tolist()]
            data: Any = self._data  # a view, or the MapStyle that says it is random
            pair: Pair = data.gather(wanted, seeds=seeds)
            return pair

        return _Read(*read_good(read, indices, len(self._data), self._on_error))

    def _read_ahead(self, indices: Indices, step: int) -> "_Read":
        read = self._read(indices, step)
        if self._stream is None:
            return read
        pinned = [part.pin_memory() for part in read.pair]
        with torch.cuda.stream(self._stream):
            moved = [part.to(self._device, non_blocking=True) for part in pinned]
        return _Read((moved[0], moved[1]), read.replaced, self._stream.record_event())

    def _from_device(self, numbers: Indices) -> Pair:
        assert self._resident is not None
        at = torch.from_numpy(numbers).to(self._device, non_blocking=True)
        stored = (part.index_select(0, at) for part in self._resident)
        inputs, targets = self._root.decode(*stored)
        return inputs, targets


class _Read:
    """A batch that was read, perhaps still on its way to the device."""

    def __init__(self, pair: Pair, replaced: int, arrived: torch.cuda.Event | None = None) -> None:
        self.pair, self.replaced, self._arrived = pair, replaced, arrived

    def to(self, device: torch.device) -> Pair:
        """The batch on the device, for the current stream."""
        if self._arrived is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self._arrived)
            for part in self.pair:
                part.record_stream(stream)
        inputs, targets = self.pair
        return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def _on_device(root: Any, device: torch.device) -> Pair | None:
    """All that the data set stores, on the device, where that fits; None else, and on a CPU."""
    if device.type == "cpu" or not hasattr(root, "tensors"):
        return None
    stored = root.tensors()
    if stored is None:
        return None
    size = sum(part.numel() * part.element_size() for part in stored)
    if size > torch.cuda.get_device_properties(device).total_memory // _SHARE_OF_DEVICE:
        return None
    return stored[0].to(device), stored[1].to(device)
