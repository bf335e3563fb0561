"""Splits without a list, and the description of a data set."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from descent.data.base import Subset
from descent.data.description import describe
from descent.data.digits import Digits
from descent.data.splits import Part, Strata, hold_out, split
from descent.data.stdlib_bytes import StdlibBytes
from descent.errors import DataError


@settings(deadline=None)
@given(n=st.integers(2, 3000), share=st.floats(0.001, 0.999), seed=st.integers(0, 2**40))
def test_kept_and_held_out_are_a_partition_in_order(n: int, share: float, seed: int) -> None:
    strata = Strata(n, min(n - 1, max(1, round(n * share))), seed)
    held = strata.held_out(np.arange(strata.held))
    kept = strata.kept(np.arange(n - strata.held))
    assert sorted([*held.tolist(), *kept.tolist()]) == list(range(n))
    assert (np.diff(held) > 0).all() and (np.diff(kept) > 0).all()
    cut = seed % (n + 1)
    assert strata.kept_before(cut) == (kept < cut).sum()


@settings(deadline=None)
@given(n=st.integers(2**29, 2**31), seed=st.integers(0, 99), share=st.floats(0.01, 0.9))
def test_of_a_huge_set_any_sample_is_found_at_once(n: int, seed: int, share: float) -> None:
    strata = Strata(n, int(n * share), seed)
    at = np.linspace(0, n - strata.held - 1, 1000).astype(np.int64)
    kept = strata.kept(at)
    assert (np.diff(kept) > 0).all() and kept[0] >= 0 and kept[-1] < n
    assert [strata.kept_before(int(k)) for k in kept[:20]] == at[:20].tolist()
    held = strata.held_out(np.linspace(0, strata.held - 1, 1000).astype(np.int64))
    assert not set(held.tolist()) & set(kept.tolist())


def test_the_same_on_every_machine_and_version() -> None:
    assert Strata(12, 3, 7).held_out(np.arange(3)).tolist() == [2, 7, 8]


def test_train_evaluation_and_test_are_disjoint_and_the_test_part_stays() -> None:
    data = Digits()
    parts = split(data, 0.2, 0.1, 3)
    numbers = [set(_numbers(part)) for part in parts]
    assert sum(map(len, numbers)) == len(set.union(*numbers)) == len(data)
    assert [len(n) for n in numbers] == [1797 - 180 - 359, 359, 180]
    assert set(_numbers(split(data, 0.4, 0.1, 3)[2])) == numbers[2]
    assert split(data, 0.0, 0.0, 3) == (data, None, None)
    with pytest.raises(DataError, match=r"data\.holdout=0\.6 and data\.test=0\.4 leave nothing"):
        split(data, 0.6, 0.4, 0)


def _numbers(part: object) -> list[int]:
    assert isinstance(part, Part)
    numbers = part.parent_indices(np.arange(len(part)))
    return (part.data.parent_indices(numbers) if isinstance(part.data, Part) else numbers).tolist()


def test_the_profile_counts_classes_and_measures_inputs() -> None:
    data = Digits()
    train, _ = hold_out(data, 0.25, 1)
    described = describe(train)
    labels = data.targets[_numbers(train)].numpy()
    assert described["classes"] == {str(c): int((labels == c).sum()) for c in range(10)}
    everything = describe(Subset(data, np.arange(500)))
    pixels = data.inputs[:500].double()
    assert everything["inputs"]["mean"] == pytest.approx(float(pixels.mean()), abs=1e-5)
    assert everything["inputs"]["std"] == pytest.approx(float(pixels.std(correction=0)), abs=1e-5)
    assert (everything["inputs"]["min"], everything["inputs"]["max"]) == (0.0, 1.0)
    text = describe(StdlibBytes(16, max_bytes=9000))
    assert text["inputs"]["distinct"] > 30 and "classes" not in text
