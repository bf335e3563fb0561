"""The feed alone: the right samples, read ahead or not; bad records, random ones, and what is waited for."""

import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from descent.data.base import TensorData
from descent.data.data_thread import data_thread
from descent.data.map_style import MapStyle
from descent.data.splits import hold_out
from descent.errors import DataError
from descent.training.input.feed import Feed
from descent.training.input.sampling import SampleOrder, slot_bounds

CPU = torch.device("cpu")


class Numbers(Dataset):
    """Sample i is (i, -i); remembers the threads that read, and fails at the samples `bad`."""

    def __init__(self, length: int = 50, bad: tuple[int, ...] = ()) -> None:
        self.length, self.bad = length, bad
        self.threads: set[str] = set()
        self.reads = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        self.threads.add(threading.current_thread().name)
        self.reads += 1
        if index in self.bad:
            raise ValueError("torn")
        return torch.tensor([float(index)]), -index


class Noisy(Numbers):
    """The same with noise from each of the three generators that augmentations use."""

    def __getitem__(self, index: int):
        noise = torch.rand(1) + np.random.rand() + random.random()
        return torch.tensor([float(index)]) + noise.float(), index


def in_memory(length: int = 50) -> TensorData:
    x = torch.arange(float(length))[:, None]
    return TensorData(x, -torch.arange(length), num_outputs=1, name="n", source="here")


def run(feed: Feed, order: SampleOrder, steps: range, slots: int, micro: int, prepare=True):
    """What each step gets, as (inputs, targets) lists in the order of the global batch."""
    bounds = list(enumerate(slot_bounds(order.batch_size, slots)))
    got = []
    for step in steps:
        if prepare:
            feed.prepare(step, bounds, micro)
        parts = [
            feed.fetch(step, first, min(first + micro, hi)) for _, (lo, hi) in bounds for first in range(lo, hi, micro)
        ]
        got.append([torch.cat(part)[:].flatten().tolist() for part in zip(*parts, strict=True)])
    return got


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 20),
    slots=st.integers(1, 4),
    micro=st.integers(1, 9),
    seed=st.integers(0, 99),
    ahead=st.booleans(),
    prepare=st.booleans(),
)
def test_a_step_gets_its_samples_in_order(batch, slots, micro, seed, ahead, prepare):
    slots = min(slots, batch)
    data = MapStyle(Numbers()) if ahead else in_memory()
    order = SampleOrder.of(data, batch, seed)
    feed = Feed(data, order, CPU)
    for step, (x, y) in zip(range(3, 8), run(feed, order, range(3, 8), slots, micro, prepare), strict=True):
        assert x == order.samples_of(step).tolist()
        assert y == (-order.samples_of(step)).tolist()


def test_a_set_in_memory_is_read_on_the_spot_and_another_ahead():
    data = MapStyle(Numbers())
    order = SampleOrder.of(data, 10, 0)
    feed = Feed(data, order, CPU)
    data.dataset.threads.clear()
    run(feed, order, range(1, 4), 2, 5)
    assert data.dataset.threads == {"data_0"}
    assert Feed(in_memory(), order, CPU)._readers is None


def test_reads_ahead_are_bounded_whatever_the_batch():
    data = MapStyle(Numbers(1000))
    order = SampleOrder.of(data, 1000, 0)
    feed = Feed(data, order, CPU)
    data.dataset.reads = 0
    feed.prepare(1, [(0, (0, 1000))], 10)
    data_thread().submit(int).result()  # waits for the reads before
    assert data.dataset.reads == 40


def test_forgotten_reads_are_made_anew_for_other_slots():
    data = MapStyle(Numbers())
    order = SampleOrder.of(data, 12, 3)
    feed = Feed(data, order, CPU)
    feed.prepare(1, [(0, (0, 12))], 4)
    feed.forget()
    assert run(feed, order, range(1, 3), 3, 2)[0][0] == order.samples_of(1).tolist()


# --- bad records ---


def test_a_bad_record_ends_the_run_by_name_unless_it_may_be_skipped():
    data = MapStyle(Numbers(bad=(17, 18, 30)))
    order = SampleOrder.of(data, 50, 0)
    with pytest.raises(
        DataError, match=r"^sample (17|18|30) of .*Numbers: ValueError: torn \(test_feed.py, line \d+\) \(data"
    ):
        run(Feed(data, order, CPU), order, range(1, 2), 2, 5)


@pytest.mark.parametrize("prepare", [True, False])
@pytest.mark.parametrize(("slots", "micro"), [(1, 50), (2, 7), (5, 3)])
def test_replacements_do_not_depend_on_who_reads_and_are_counted(slots, micro, prepare):
    data = MapStyle(Numbers(bad=(17, 18, 30)))
    order = SampleOrder.of(data, 50, 0)
    feed = Feed(data, order, CPU, on_error="skip")
    ((x, y),) = run(feed, order, range(1, 2), slots, micro, prepare)
    instead = {17: 19, 18: 19, 30: 31}
    assert x == [instead.get(i, i) for i in order.samples_of(1).tolist()]
    assert y == [-i for i in x]
    assert feed.replaced() == 3
    assert feed.replaced() == 0


def test_nothing_but_bad_records_ends_even_with_skip():
    class Rotten(Numbers):
        def __getitem__(self, index):
            if self.reads > 60:
                raise ValueError("torn")
            return super().__getitem__(index)

    data = MapStyle(Rotten())
    data.dataset.reads = 99
    feed = Feed(data, SampleOrder.of(data, 10, 0), CPU, on_error="skip")
    with pytest.raises(DataError, match=r"samples in a row can't be used: sample"):
        feed.take(np.arange(10))


# --- random numbers while reading ---


def test_only_what_draws_is_seeded():
    assert MapStyle(Noisy()).draws_random_numbers
    assert not MapStyle(Numbers()).draws_random_numbers


@settings(deadline=None, max_examples=10)
@given(slots=st.integers(1, 6), micro=st.integers(1, 12), seed=st.integers(0, 2**40))
def test_augmentation_is_a_function_of_seed_step_and_sample(slots, micro, seed):
    def noise(slots: int, micro: int, steps: range) -> list:
        data = MapStyle(Noisy())
        train, _ = hold_out(data, 0.2, 0)
        order = SampleOrder.of(train, 12, 1)
        return run(Feed(train, order, CPU, seed=seed), order, steps, slots, micro)

    whole = noise(1, 12, range(1, 5))
    assert noise(slots, micro, range(1, 5)) == whole
    assert noise(slots, micro, range(3, 5)) == whole[2:], "also from a step in the middle"
    per_sample: dict[int, set[float]] = {}
    for x, y in whole:
        for value, sample in zip(x, y, strict=True):
            per_sample.setdefault(sample, set()).add(round(value - sample, 5))
    assert len({v for values in per_sample.values() for v in values}) > 40, "they differ"


def test_reading_leaves_the_model_s_random_numbers_alone():
    data = MapStyle(Noisy())
    feed = Feed(data, SampleOrder.of(data, 10, 0), CPU, seed=1)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(3).tolist(), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    feed.take(np.arange(10), step=3)
    assert (torch.rand(3).tolist(), np.random.rand(), random.random()) == expected


# --- waiting ---


def test_what_a_step_waits_for_is_measured_and_counted_once():
    gate = threading.Event()

    class Slow(Numbers):
        slow = False

        def __getitem__(self, index):
            if self.slow:
                assert gate.wait(30)
            return super().__getitem__(index)

    data = MapStyle(Slow())
    data.dataset.slow = True
    order = SampleOrder.of(data, 10, 0)
    feed = Feed(data, order, CPU)
    feed.prepare(1, [(0, (0, 10))], 10)
    opener = threading.Timer(0.2, gate.set)
    opener.start()
    feed.fetch(1, 0, 10)
    opener.join()
    assert feed.waited_s() > 0.05
    assert feed.waited_s() == 0.0
