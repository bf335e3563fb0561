"""Decoded row groups, cached in one block of memory so that one index operation gathers a batch from many groups."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from descent.data.batch import Indices, Pair
from descent.errors import DataError

_ABSENT = -1


class RowGroupCache:
    """A ring buffer of rows: a new group overwrites the groups that have been there longest.

    read: decodes one group into inputs [rows, ...] and targets [rows, ...]; called by one thread at a time.
    starts: [groups + 1], the first sample of each group, then the number of samples.
    capacity: the rows that the buffer holds.

    Several threads may call `gather` at the same time. A background thread decodes the groups that
    `prefetch` names.
    """

    def __init__(self, read: Callable[[int], Pair], starts: Indices, capacity: int) -> None:
        self._read, self._starts = read, starts
        largest = int(np.diff(starts).max())
        self._capacity = min(int(starts[-1]), max(capacity, largest))
        self._rows: Pair | None = None
        self._place: Indices = np.full(len(starts) - 1, _ABSENT, dtype=np.int64)
        """The row of the buffer at which each group begins."""
        self._present: deque[int] = deque()  # groups, the one that has been there longest first
        self._next_row = 0
        self._lock = threading.Lock()  # guards all of the above
        self._reading = threading.Lock()  # held by the thread that calls `read`
        self._to_prefetch: deque[int] = deque()
        self._prefetcher: ThreadPoolExecutor | None = None
        self._prefetching = False

    def prefetch(self, groups: Iterable[int]) -> None:
        """Decode these groups in the background, in this order: they are needed soon."""
        with self._lock:
            self._to_prefetch = deque(groups)
            if self._prefetching:
                return
            self._prefetching = True
            if self._prefetcher is None:
                self._prefetcher = ThreadPoolExecutor(1, "row groups")
        self._prefetcher.submit(self._prefetch_one)

    def gather(self, indices: Indices) -> Pair:
        """Inputs [n, ...] and targets [n, ...] of the samples."""
        groups = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[groups]
        with self._lock:
            places = self._place[groups]
            absent = places < 0
            if self._rows is not None and not absent.any():
                return _select(self._rows, places + rows)
            present = None
            if self._rows is not None and not absent.all():
                present = _select(self._rows, (places + rows)[~absent])
        parts, order = ([], []) if present is None else ([present], [np.flatnonzero(~absent)])
        for group in np.unique(groups[absent]).tolist():
            in_group = np.flatnonzero(groups == group)
            parts.append(_select(self._load(group), rows[in_group]))
            order.append(in_group)
        as_asked = torch.from_numpy(np.argsort(np.concatenate(order)))
        inputs, targets = (torch.cat(part).index_select(0, as_asked) for part in zip(*parts, strict=True))
        return inputs, targets

    def _load(self, group: int) -> Pair:
        """A group's rows, which the buffer holds from now on."""
        with self._reading:
            with self._lock:  # another thread may have read the group while this one waited
                at = int(self._place[group])
                if self._rows is not None and at >= 0:
                    stop = at + self._count(group)
                    return self._rows[0][at:stop].clone(), self._rows[1][at:stop].clone()
            pair = self._read(group)
            with self._lock:
                self._put(group, pair)
            return pair

    def _count(self, group: int) -> int:
        return int(self._starts[group + 1] - self._starts[group])

    def _put(self, group: int, pair: Pair) -> None:
        if self._rows is None:  # the operating system gives memory to a page only when it is first written
            x, y = (part.new_empty((self._capacity, *part.shape[1:])) for part in pair)
            self._rows = x, y
        count = len(pair[0])
        first = self._next_row if self._next_row + count <= self._capacity else 0
        stop = first + count
        for other in list(self._present):
            at = int(self._place[other])
            if at < stop and at + self._count(other) > first:
                self._present.remove(other)
                self._place[other] = _ABSENT
        for whole, part in zip(self._rows, pair, strict=True):
            whole[first:stop] = part
        self._present.append(group)
        self._place[group], self._next_row = first, stop

    def _prefetch_one(self) -> None:
        """Decode one group and submit this method again: an interpreter that ends waits for one group, not for all."""
        with self._lock:
            while self._to_prefetch and self._place[self._to_prefetch[0]] >= 0:
                self._to_prefetch.popleft()
            if not self._to_prefetch:
                self._prefetching = False
                return
            group = self._to_prefetch.popleft()
        with contextlib.suppress(DataError):  # the thread that needs the group reads it again and raises
            self._load(group)
        assert self._prefetcher is not None
        with contextlib.suppress(RuntimeError):  # raised when the interpreter ends
            self._prefetcher.submit(self._prefetch_one)


def _select(pair: Pair, at: Indices) -> Pair:
    index = torch.from_numpy(at)
    return pair[0].index_select(0, index), pair[1].index_select(0, index)


def memory_bytes() -> int:
    """The memory of the machine, or of the container where that is limited."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no cgroups, or "max"
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def check_memory(source: str, rows: int, row_bytes: int, memory: int) -> None:
    """Raise DataError where the rows to cache would take more than half of the memory."""
    needed = rows * row_bytes
    if needed > memory // 2:
        raise DataError(
            f"{source}: the rows of two windows and four row groups take {needed / 1e9:.3g} GB as floats, more "
            f"than half of the {memory / 1e9:.3g} GB of memory: give a smaller data.window, or write the file "
            "with smaller row groups"
        )
