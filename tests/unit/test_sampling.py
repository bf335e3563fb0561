"""Each sample once an epoch, the same order for everyone, any step at once."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from descent.data.layout import Layout, layout_of
from descent.training.input.sampling import (
    SampleOrder,
    ShardStream,
    order,
    permute,
    slot_bounds,
    stream_seed,
)

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**62)


@given(n=sizes, key=seeds)
def test_an_epoch_is_a_permutation(n: int, key: int) -> None:
    assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


@given(n=sizes, key=seeds, data=st.data())
def test_a_few_positions_go_where_they_go_among_all(n: int, key: int, data: st.DataObject) -> None:
    """Few are computed one by one, many from a table."""
    lo = data.draw(st.integers(0, n - 1))
    hi = data.draw(st.integers(lo, n))
    whole = permute(np.arange(n), n, key)
    assert np.array_equal(permute(np.arange(lo, hi), n, key), whole[lo:hi])


@given(
    n=st.integers(2**31, 2**45),
    key=seeds,
    at=st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=50, unique=True),
)
def test_positions_stay_distinct_and_inside_for_huge_sets(n: int, key: int, at: list[int]) -> None:
    out = permute(np.array(at, dtype=np.int64), n, key)
    assert len(set(out.tolist())) == len(at)
    assert out.min() >= 0 and out.max() < n


@given(n=st.integers(1, 200), batch=st.integers(1, 50), seed=seeds, epochs=st.integers(1, 3))
def test_steps_spend_each_sample_once_per_epoch_also_where_the_batch_does_not_divide(
    n: int, batch: int, seed: int, epochs: int
) -> None:
    batch = min(batch, n)
    samples = SampleOrder(n, batch, seed)
    steps = -(-n * epochs // batch)
    stream = np.concatenate([samples.samples_of(s) for s in range(1, steps + 1)])
    for epoch in range(epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@given(
    n=sizes,
    batch=st.integers(1, 64),
    seed=seeds,
    steps=st.lists(st.integers(1, 10**6), min_size=1, max_size=5),
)
def test_a_step_can_be_asked_for_in_any_order(n: int, batch: int, seed: int, steps: list[int]) -> None:
    batch = min(batch, n)
    jumping = SampleOrder(n, batch, seed)
    for step in steps:
        direct = order((step - 1) * batch, step * batch, n, seed)
        assert jumping.samples_of(step).tolist() == direct.tolist()


def test_epochs_and_seeds_differ_and_the_order_is_not_the_identity() -> None:
    first, second = order(0, 1000, 1000, 0), order(1000, 2000, 1000, 0)
    other = order(0, 1000, 1000, 1)
    assert (first == second).mean() < 0.02
    assert (first == other).mean() < 0.02
    assert (first == np.arange(1000)).mean() < 0.02


def test_a_sample_is_equally_likely_at_each_position() -> None:
    # Sample 0's position over 4,000 seeds in 8 equal bins: chi-squared with 7 degrees of freedom
    # stays under 29.9 with probability 0.9999.
    positions = [int(np.flatnonzero(permute(np.arange(64), 64, seed) == 0)[0]) for seed in range(4000)]
    counts = np.bincount(np.array(positions) // 8, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 29.9


@given(batch=st.integers(1, 500), slots=st.integers(1, 16))
def test_slots_cut_the_batch_into_even_parts(batch: int, slots: int) -> None:
    bounds = slot_bounds(batch, slots)
    assert bounds[0][0] == 0 and bounds[-1][1] == batch
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    lengths = [hi - lo for lo, hi in bounds]
    assert max(lengths) - min(lengths) <= 1


@settings(max_examples=20)
@given(seed=seeds)
def test_streams_of_steps_and_slots_are_distinct(seed: int) -> None:
    streams = {stream_seed(seed, step, slot) for step in range(50) for slot in range(8)}
    assert len(streams) == 400
    assert all(0 <= s < 2**63 for s in streams)


# --- by shards ---

layouts = st.builds(layout_of, st.lists(st.integers(0, 60), min_size=1, max_size=15).filter(any), st.integers(1, 90))


@given(layout=layouts, batch=st.integers(1, 50), seed=seeds)
def test_by_shards_each_sample_comes_once_an_epoch_too(layout: Layout, batch: int, seed: int) -> None:
    n = int(layout.starts[-1])
    batch = min(batch, n)
    samples = SampleOrder(n, batch, seed, layout)
    stream = np.concatenate([samples.samples_of(s) for s in range(1, -(-3 * n // batch) + 1)])
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@given(
    layout=layouts,
    batch=st.integers(1, 64),
    seed=seeds,
    steps=st.lists(st.integers(1, 10**6), min_size=1, max_size=5),
)
def test_by_shards_a_step_can_be_asked_for_in_any_order(
    layout: Layout, batch: int, seed: int, steps: list[int]
) -> None:
    n = int(layout.starts[-1])
    batch = min(batch, n)
    jumping = SampleOrder(n, batch, seed, layout)
    for step in steps:
        direct = ShardStream(layout, seed).order((step - 1) * batch, step * batch)
        assert jumping.samples_of(step).tolist() == direct.tolist()


@given(layout=layouts, seed=seeds, batch=st.integers(1, 30), step=st.integers(1, 10**5))
def test_the_shards_of_a_step_and_of_the_next_window_are_known(
    layout: Layout, seed: int, batch: int, step: int
) -> None:
    n = int(layout.starts[-1])
    batch = min(batch, n)
    samples = SampleOrder(n, batch, seed, layout)
    near = samples.shards_near(step)
    assert near is not None
    last = samples.samples_of(step)[-1]
    assert int(np.searchsorted(layout.starts, last, side="right")) - 1 in near[1]
    assert len(set(near[1].tolist())) == len(near[1])


@given(seed=seeds)
def test_a_window_draws_from_its_own_shards_only_and_shuffles_them(seed: int) -> None:
    layout = layout_of([100] * 20, 400)
    stream = SampleOrder(2000, 400, seed, layout)
    windows = [stream.samples_of(step) for step in range(1, 6)]
    shards = [set((window // 100).tolist()) for window in windows]
    assert [len(s) for s in shards] == [4] * 5 and len(set.union(*shards)) == 20
    assert set.union(*shards[:2]) == set(stream.shards_near(1)[1].tolist())  # type: ignore[index]
    for window in windows:
        assert (np.diff(window) > 0).mean() < 0.7
    following = [set((stream.samples_of(step) // 100).tolist()) for step in range(6, 11)]
    assert following != shards, "the next epoch orders them differently"
