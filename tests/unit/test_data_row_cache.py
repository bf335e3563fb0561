"""Row groups in a circle of memory, against the table that they are cut from."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from descent.data.row_cache import RowGroupCache, check_memory, memory_bytes
from descent.errors import DataError


class Table:
    """Rows with their own number in them, cut into groups; remembers which groups were decoded."""

    def __init__(self, counts: list[int]) -> None:
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        numbers = torch.arange(int(self.starts[-1]))
        self.inputs = torch.stack([numbers.float(), -numbers.float()], 1)
        self.targets = numbers
        self.decoded: list[int] = []

    def read(self, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.decoded.append(group)
        part = slice(int(self.starts[group]), int(self.starts[group + 1]))
        return self.inputs[part], self.targets[part]


def assert_gathers(groups: RowGroupCache, table: Table, indices: np.ndarray) -> None:
    inputs, targets = groups.gather(indices)
    assert torch.equal(inputs, table.inputs[torch.from_numpy(indices)])
    assert targets.tolist() == indices.tolist()


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any),
    capacity=st.integers(1, 60),
    seed=st.integers(0, 999),
)
def test_whatever_the_sizes_and_the_room_a_batch_is_what_was_asked_for(counts, capacity, seed):
    table = Table(counts)
    groups = RowGroupCache(table.read, table.starts, capacity)
    rng = np.random.default_rng(seed)
    for _ in range(12):
        assert_gathers(groups, table, rng.integers(0, sum(counts), int(rng.integers(1, 20))))


def test_several_threads_gather_while_others_are_decoded_ahead():
    table = Table([5] * 20)
    groups = RowGroupCache(table.read, table.starts, 30)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 100, 8) for _ in range(200)]

    def one(chosen: np.ndarray) -> None:
        groups.prefetch(np.unique(chosen // 5).tolist())
        assert_gathers(groups, table, chosen)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(one, batches))


def test_prefetched_groups_are_decoded_before_they_are_asked_for():
    table, done = Table([4] * 6), threading.Event()

    def read(group: int) -> tuple[torch.Tensor, torch.Tensor]:
        if group == 5:
            done.set()  # the last of those prefetched: the others are there
        return table.read(group)

    groups = RowGroupCache(read, table.starts, 24)
    groups.prefetch([3, 1, 5])
    assert done.wait(30)
    assert table.decoded[:2] == [3, 1]
    assert_gathers(groups, table, np.array([4, 15, 12, 7]))
    assert sorted(table.decoded) == [1, 3, 5]


def test_a_group_that_cannot_be_decoded_is_an_error_for_the_thread_that_asks_for_it():
    table = Table([4, 4])

    def read(group: int) -> tuple[torch.Tensor, torch.Tensor]:
        if group == 1:
            raise DataError("row group 1: can't be read")
        return table.read(group)

    groups = RowGroupCache(read, table.starts, 8)
    groups.prefetch([1, 0])
    assert_gathers(groups, table, np.array([3, 0]))
    with pytest.raises(DataError, match="row group 1"):
        groups.gather(np.array([2, 6]))


def test_rows_that_would_fill_more_than_half_of_the_memory_are_refused_in_words():
    assert memory_bytes() > 1 << 28
    check_memory("t.parquet", 1000, 500, 1_000_000)
    with pytest.raises(DataError, match=r"t.parquet: .* take 2 GB .* of the 3 GB .* data.window"):
        check_memory("t.parquet", 1_000_000, 2000, 3_000_000_000)
