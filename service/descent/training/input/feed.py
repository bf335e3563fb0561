"""Batches for a step: from memory or the device where the data lies there, else read in the background ahead of use."""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import torch
from torch import Tensor

from descent.data.bad_records import Policy, read_good
from descent.data.base import Data, Pair, indices_in_root, root_of
from descent.data.batch import Batch, map_tensors, tensors_of, to_device
from descent.data.data_thread import data_thread
from descent.data.identity import FileWatch
from descent.data.map_style import UserData, is_collated
from descent.training.input.sampling import Indices, SampleOrder, stream_seed

_DEPTH = 4
_SHARE_OF_DEVICE = 8
"""A data set of at most an eighth of the device's memory is kept there: of all its memory, not of what is
free, because a run's bits must not depend on the other programs on the device."""
_Key = tuple[int, int, int]
"""(step, first sample, end) of a part of a step's global batch."""


class Feed:
    """Gives the micro-batches of a step on the device.

    A data set in memory is indexed in the calling thread: handing a few microseconds of work to another
    thread would cost more than it saves. So is a data set that draws random numbers, because it shares
    the generators with the model; it is seeded by (step, sample). Any other data set is read in the
    background up to a step ahead, and copied to the device meanwhile. A user's data set is read by one
    thread only, the process's data thread, unless it is `thread_safe`. Bad records are treated as
    `on_error` says (see `descent.data.bad_records.read_good`).

    order: the sample order, for `prepare` and `fetch`; None for a data set of which only `take` is used.
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
        self._root = root_of(data)
        self._resident = None if is_collated(data) else _on_device(self._root, device)
        in_place = data.in_memory or self._resident is not None or data.draws_random_numbers
        self._readers: Executor | None = None if in_place else _readers_of(self._root)
        reads_ahead = self._readers is not None
        self._stream = torch.cuda.Stream(device) if reads_ahead and device.type == "cuda" else None
        self._watch = FileWatch(data.files)
        self._to_read: deque[_Key] = deque()
        self._reading: dict[_Key, Future[_Read]] = {}
        self._window = -1
        self._waited_s = 0.0
        self._replaced = 0

    def numbers(self, indices: Indices) -> Indices:
        """The samples' numbers in the data set as it is stored, before any split."""
        return indices_in_root(self._data, indices)

    def take(self, indices: Indices, step: int = 0) -> Batch:
        """The samples `indices` as a batch on the device."""
        begin = time.perf_counter()
        read = self._read(indices, step)
        self._replaced += read.replaced
        batch = read.to(self._device)
        self._waited_s += time.perf_counter() - begin
        return batch

    def prepare(self, step: int, slots: Sequence[tuple[int, tuple[int, int]]], micro_size: int) -> None:
        """Start to read what `fetch` will be asked for in this step, and what the next step begins with.

        slots: (slot, (first sample, end)) of the slots that this rank computes.
        Raises DataError where a file that is read while the run trains has changed.
        """
        self._watch.refuse_changed()
        self._prefetch_shards(step)
        if self._readers is None:
            return
        pieces = [(f, min(f + micro_size, hi)) for _, (lo, hi) in slots for f in range(lo, hi, micro_size)]
        known = {*self._reading, *self._to_read}
        for wanted in (step, step + 1):
            self._to_read.extend(key for p in pieces if (key := (wanted, *p)) not in known)
        self._start_reads()

    def _prefetch_shards(self, step: int) -> None:
        """Name the shards that come next to a data set in shards, once for each window."""
        near = None if self._order is None else self._order.shards_near(step)
        if near is not None and near[0] != self._window:
            self._window = near[0]
            self._root.prefetch(near[1])

    def _start_reads(self) -> None:
        """Keep a few reads under way; bounded, because a global batch may be larger than memory."""
        assert self._readers is not None and self._order is not None
        while self._to_read and len(self._reading) < _DEPTH:
            key = self._to_read.popleft()
            indices = self._order.samples_of(key[0])[key[1] : key[2]]
            self._reading[key] = self._readers.submit(self._read_ahead, indices, key[0])

    def fetch(self, step: int, first: int, stop: int) -> Batch:
        """The samples at places first … stop-1 of the step's global batch, on the device."""
        assert self._order is not None
        future = self._reading.pop((step, first, stop), None)
        if future is None:
            return self.take(self._order.samples_of(step)[first:stop], step)
        begin = time.perf_counter()
        self._start_reads()
        read = future.result()
        self._replaced += read.replaced
        batch = read.to(self._device)
        self._waited_s += time.perf_counter() - begin
        return batch

    def forget(self) -> None:
        """Drop what was read ahead: this rank may get other slots next."""
        for future in self._reading.values():
            future.cancel()
        self._reading.clear()
        self._to_read.clear()

    def waited_s(self) -> float:
        """Seconds that steps have waited for data since the last call."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def replaced(self) -> int:
        """Number of bad records that were replaced since the last call."""
        count, self._replaced = self._replaced, 0
        return count

    def _read(self, indices: Indices, step: int) -> "_Read":
        def read(wanted: Indices) -> Batch:
            if self._resident is not None:
                return self._from_device(indices_in_root(self._data, wanted))
            if not self._data.draws_random_numbers:
                return self._data.gather(wanted)
            seeds = [stream_seed(self._seed, step, sample) for sample in wanted.tolist()]
            return self._data.gather_seeded(wanted, seeds)

        return _Read(*read_good(read, indices, len(self._data), self._on_error))

    def _read_ahead(self, indices: Indices, step: int) -> "_Read":
        read = self._read(indices, step)
        if self._stream is None:
            return read
        pinned = map_tensors(Tensor.pin_memory, read.batch)
        with torch.cuda.stream(self._stream):
            moved = to_device(pinned, self._device)
        return _Read(moved, read.replaced, self._stream.record_event())

    def _from_device(self, numbers: Indices) -> Pair:
        assert self._resident is not None
        self._root.refuse_known_bad(numbers)
        at = torch.from_numpy(numbers).to(self._device, non_blocking=True)
        inputs, targets = (part.index_select(0, at) for part in self._resident)
        return self._root.decode(inputs, targets)


class _Read:
    """A batch that was read, whose copy to the device may still be under way."""

    def __init__(self, batch: Batch, replaced: int, arrived: torch.cuda.Event | None = None) -> None:
        """arrived: the end of the copy to the device; None for a batch in the computer's memory."""
        self.batch, self.replaced, self._arrived = batch, replaced, arrived

    def to(self, device: torch.device) -> Batch:
        """The batch on the device, for use in the current stream."""
        if self._arrived is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self._arrived)
            for _, tensor in tensors_of(self.batch):
                tensor.record_stream(stream)
        if type(self.batch) is tuple and len(self.batch) == 2 and isinstance(self.batch[0], Tensor):
            inputs, targets = self.batch  # most batches, and this is a part of every step
            if isinstance(targets, Tensor):
                return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        return to_device(self.batch, device)


def _readers_of(root: Data) -> Executor:
    """The threads that may read this data set in the background."""
    if isinstance(root, UserData) and not root.thread_safe:
        return data_thread()
    return ThreadPoolExecutor(root.readers, "feed")


def _on_device(root: Data, device: torch.device) -> Pair | None:
    """The whole data set as it is stored, on the device, where it fits there; None else, and for a CPU."""
    if device.type == "cpu":
        return None
    stored = root.stored()
    if stored is None:
        return None
    size = sum(part.numel() * part.element_size() for part in stored)
    if size > torch.cuda.get_device_properties(device).total_memory // _SHARE_OF_DEVICE:
        return None
    return stored[0].to(device), stored[1].to(device)
