"""Batches for the step: straight from memory where the data lies there, else read ahead in the background."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from service.data.base import Data, Subset, TensorData
from service.training.sampling import Indices, SampleOrder

_DEPTH = 4
Pair = tuple[Tensor, Tensor]


def _in_memory(data: object) -> bool:
    while isinstance(data, Subset):
        data = data.data
    return isinstance(data, TensorData)


class Feed:
    """Gives a step's micro-batches on the device.

    A data set in memory is indexed on the spot: handing a few microseconds of
    work to a thread would cost more than it saves. Any other is read one step ahead.
    """

    def __init__(self, data: Data, order: SampleOrder | None, device: torch.device) -> None:
        self._data = data
        self._order = order
        self._device = device
        self._ahead = None if _in_memory(data) else ThreadPoolExecutor(1, "feed")
        self._queue: deque[tuple[int, int, int]] = deque()
        self._waiting: dict[tuple[int, int, int], Future[Pair]] = {}

    def numbers(self, indices: Indices) -> Indices:
        """The samples' numbers in the data set as it is stored, before any split."""
        data: object = self._data
        while isinstance(data, Subset):
            indices, data = data.indices[indices], data.data
        return indices

    def take(self, indices: Indices) -> Pair:
        """The samples `indices`: inputs [n, …] and targets [n, …] on the device."""
        return self._to_device(self._data.gather(indices))

    def _to_device(self, pair: Pair) -> Pair:
        if self._device.type == "cpu":
            return pair
        return pair[0].to(self._device, non_blocking=True), pair[1].to(
            self._device, non_blocking=True
        )

    def prepare(
        self, step: int, slots: Sequence[tuple[int, tuple[int, int]]], micro_size: int
    ) -> None:
        """Say what this step will fetch, so that it and the next step's first reads run ahead."""
        if self._ahead is None:
            return
        pieces = [
            (f, min(f + micro_size, hi)) for _, (lo, hi) in slots for f in range(lo, hi, micro_size)
        ]
        known = {*self._waiting, *self._queue}
        for wanted in (step, step + 1):
            self._queue.extend(key for p in pieces if (key := (wanted, *p)) not in known)
        self._fill()

    def _fill(self) -> None:
        """Keep a few reads under way; a bound, because a global batch may be larger than memory."""
        assert self._ahead is not None and self._order is not None
        while self._queue and len(self._waiting) < _DEPTH:
            key = self._queue.popleft()
            indices = self._order.samples_of(key[0])[key[1] : key[2]]
            self._waiting[key] = self._ahead.submit(self._data.gather, indices)

    def fetch(self, step: int, first: int, stop: int) -> Pair:
        """Samples first … stop-1 of the step's global batch."""
        assert self._order is not None
        future = self._waiting.pop((step, first, stop), None)
        if future is not None:
            self._fill()
            return self._to_device(future.result())
        return self.take(self._order.samples_of(step)[first:stop])

    def forget(self) -> None:
        """Drop what was read ahead: the next generation may deal the slots anew."""
        for future in self._waiting.values():
            future.cancel()
        self._waiting.clear()
        self._queue.clear()
