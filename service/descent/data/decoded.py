"""Decoded row groups in one block of memory, so that one index gathers a batch from all of them."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from descent.data.base import Indices, Pair
from descent.errors import DataError

_GONE = -1


class DecodedGroups:
    """A circle of rows: new groups take the place of those that came first.

    read: decodes one group into inputs [rows, …] and targets [rows, …]; called from one thread
    at a time. starts: [groups + 1], the first sample of each group. capacity: rows that are kept.

    Several threads may gather, and a thread of its own decodes what is `expect`ed.
    """

    def __init__(self, read: Callable[[int], Pair], starts: npt.NDArray[np.int64], capacity: int) -> None:
        self._read, self._starts = read, starts
        largest = int(np.diff(starts).max())
        self._capacity = min(int(starts[-1]), max(capacity, largest))
        self._rows: Pair | None = None
        self._place: npt.NDArray[np.int64] = np.full(len(starts) - 1, _GONE, dtype=np.int64)
        """Where in the circle each group begins."""
        self._kept: deque[int] = deque()  # in the order of their coming
        self._free = 0
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._soon: deque[int] = deque()
        self._ahead: ThreadPoolExecutor | None = None
        self._busy = False

    def expect(self, groups: Iterable[int]) -> None:
        """Decode these in the background, in this order: they are needed soon."""
        with self._lock:
            self._soon = deque(groups)
            if self._busy:
                return
            self._busy = True
            if self._ahead is None:
                self._ahead = ThreadPoolExecutor(1, "row groups")
        self._ahead.submit(self._read_ahead)

    def gather(self, indices: Indices) -> Pair:
        """Inputs [n, …] and targets [n, …] of the samples."""
        groups = np.searchsorted(self._starts, indices, side="right") - 1
        rows = indices - self._starts[groups]
        with self._lock:
            places = self._place[groups]
            absent = places < 0
            if self._rows is not None and not absent.any():
                return _taken(self._rows, places + rows)
            here = None
            if self._rows is not None and not absent.all():
                here = _taken(self._rows, (places + rows)[~absent])
        parts, order = ([], []) if here is None else ([here], [np.flatnonzero(~absent)])
        for group in np.unique(groups[absent]).tolist():
            mine = np.flatnonzero(groups == group)
            parts.append(_taken(self._load(group), rows[mine]))
            order.append(mine)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        inputs, targets = (torch.cat(part).index_select(0, back) for part in zip(*parts, strict=True))
        return inputs, targets

    def _load(self, group: int) -> Pair:
        """A group's rows, from now on in the circle too."""
        with self._reading:
            with self._lock:  # another thread may have read it while this one waited
                at = int(self._place[group])
                if self._rows is not None and at >= 0:
                    stop = at + self._count(group)
                    return self._rows[0][at:stop].clone(), self._rows[1][at:stop].clone()
            pair = self._read(group)
            with self._lock:
                self._keep(group, pair)
            return pair

    def _count(self, group: int) -> int:
        return int(self._starts[group + 1] - self._starts[group])

    def _keep(self, group: int, pair: Pair) -> None:
        if self._rows is None:  # pages that no group has reached yet take no memory
            x, y = (part.new_empty((self._capacity, *part.shape[1:])) for part in pair)
            self._rows = x, y
        count = len(pair[0])
        first = self._free if self._free + count <= self._capacity else 0
        stop = first + count
        for other in list(self._kept):
            at = int(self._place[other])
            if at < stop and at + self._count(other) > first:
                self._kept.remove(other)
                self._place[other] = _GONE
        for whole, part in zip(self._rows, pair, strict=True):
            whole[first:stop] = part
        self._kept.append(group)
        self._place[group], self._free = first, stop

    def _read_ahead(self) -> None:
        """One group, then the next: were all submitted at once, the interpreter would end only after all."""
        with self._lock:
            while self._soon and self._place[self._soon[0]] >= 0:
                self._soon.popleft()
            if not self._soon:
                self._busy = False
                return
            group = self._soon.popleft()
        with contextlib.suppress(DataError):  # whoever needs it tries again, and tells
            self._load(group)
        assert self._ahead is not None
        with contextlib.suppress(RuntimeError):  # the interpreter ends
            self._ahead.submit(self._read_ahead)


def _taken(pair: Pair, at: Indices) -> Pair:
    index = torch.from_numpy(at)
    return pair[0].index_select(0, index), pair[1].index_select(0, index)


def memory_bytes() -> int:
    """Of the machine, or what its container may use."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no cgroups, or "max"
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def check_memory(source: str, rows: int, row_bytes: int, memory: int) -> None:
    """Refuse to keep rows that would take more than half of the memory. Raises DataError."""
    needed = rows * row_bytes
    if needed > memory // 2:
        raise DataError(
            f"{source}: the rows of two windows and four row groups take {needed / 1e9:.3g} GB as floats, more "
            f"than half of the {memory / 1e9:.3g} GB of memory: give a smaller data.window, or write the file "
            "with smaller row groups"
        )
