"""`data.sampler`: which samples an epoch has, as pure functions of seed, epoch and position."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

from descent.config import compose
from descent.data.base import Subset
from descent.data.map_style import adapt
from descent.errors import ConfigError
from descent.training.input import samplers
from descent.training.input.building import build_data, epoch_order_of
from descent.training.input.sampling import SampleOrder

N = 60
KINDS: dict[str, Callable[[], Any]] = {
    "sequential": samplers.Sequential,
    "weighted": samplers.Weighted,
    "class_balanced": samplers.ClassBalanced,
    "by_length": lambda: samplers.ByLength(window=3),
    "own": lambda: backwards,
}


class Uneven(Dataset[tuple[Tensor, int]]):
    """Sample i weighs i; two thirds are of class 0; lengths go up and down."""

    weights = np.arange(N, dtype=float)
    labels = np.arange(N) % 3 // 2
    lengths = np.arange(N) * 7 % 20

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([float(index)]), int(self.labels[index])


def backwards(epoch: int, seed: int, num_samples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)[::-1]


def order_of(sampler: Any, batch: int = 8, data: Any = None, seed: int = 3) -> SampleOrder:
    data = data or adapt(Uneven())
    return SampleOrder(len(data), batch, seed, epoch_order=samplers.bound(sampler, data, batch, seed, "data.sampler"))


@given(kind=st.sampled_from(sorted(KINDS)), step=st.integers(1, 200), batch=st.sampled_from([1, 7, 8, 60]))
def test_the_samples_of_a_step_need_no_step_before(kind: str, step: int, batch: int) -> None:
    through, jumped = order_of(KINDS[kind](), batch), order_of(KINDS[kind](), batch)
    for earlier in range(max(1, step - 9), step):
        through.samples_of(earlier)
    assert through.samples_of(step).tolist() == jumped.samples_of(step).tolist()


@pytest.mark.parametrize("kind", ["sequential", "by_length", "own"])
def test_without_replacement_each_sample_comes_up_once_an_epoch(kind: str) -> None:
    order = order_of(KINDS[kind](), 6)
    for epoch in range(3):
        samples = np.concatenate([order.samples_of(10 * epoch + step) for step in range(1, 11)])
        assert sorted(samples.tolist()) == list(range(N))
    assert kind == "sequential" or samples.tolist() != order.samples_of(1).tolist()


def drawn(sampler: Any, steps: int = 400) -> np.ndarray:
    order = order_of(sampler, N)
    return np.bincount(np.concatenate([order.samples_of(step) for step in range(1, steps + 1)]), minlength=N)


def test_weights_are_chances_as_for_torchs_sampler() -> None:
    counts = drawn(samplers.Weighted())
    torch.manual_seed(0)
    torchs = np.bincount(
        list(torch.utils.data.WeightedRandomSampler(torch.from_numpy(Uneven.weights), 400 * N)), minlength=N
    )
    expected = 400 * N * Uneven.weights / Uneven.weights.sum()
    for found in (counts, torchs):  # chi-squared with 58 degrees of freedom: above 110 by chance once in 30,000
        assert found[0] == 0
        assert ((found - expected)[1:] ** 2 / expected[1:]).sum() < 110


def test_classes_are_balanced() -> None:
    counts = drawn(samplers.ClassBalanced())
    assert counts[Uneven.labels == 1].sum() / counts.sum() == pytest.approx(0.5, abs=0.01)
    assert counts.min() > 0


def test_batches_have_samples_of_similar_length_in_no_order() -> None:
    order = order_of(samplers.ByLength(window=5), 6)
    spreads = [float(np.ptp(Uneven.lengths[order.samples_of(step)])) for step in range(1, 11)]
    assert np.mean(spreads) < 5 < np.ptp(Uneven.lengths)
    means = [float(Uneven.lengths[order.samples_of(step)].mean()) for step in range(1, 6)]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_numbers_of_all_samples_serve_a_part_of_them() -> None:
    part = Subset(adapt(Uneven()), np.arange(40, N))
    whole, own = order_of(samplers.Weighted(), data=part), order_of(samplers.Weighted([*range(40, N)]), data=part)
    assert whole.samples_of(5).tolist() == own.samples_of(5).tolist()
    assert whole.samples_of(5).max() < 20


def test_a_file_of_weights(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", Uneven.weights)
    found = order_of(samplers.Weighted(str(tmp_path / "w.npy"))).samples_of(2)
    assert found.tolist() == order_of(samplers.Weighted()).samples_of(2).tolist()


def test_digits_are_balanced_by_name() -> None:
    config = compose(["experiment=digits", "data.sampler=class_balanced"]).config
    train, _ = build_data(config)
    assert epoch_order_of(config, train, 64) is not None
    assert epoch_order_of(compose(["experiment=digits"]).config, train, 64) is None


class Bare(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([float(index)]), 0


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (samplers.Weighted([1.0] * 59), "shape [59]; it must have one number for each of the 60 samples"),
        (samplers.Weighted([0.0] * 60), "all are 0"),
        (samplers.Weighted([1.0] * 59 + [-2.0]), "sample 59 has -2"),
        (samplers.Weighted([1.0] * 58 + [float("nan"), 1.0]), "sample 58 has nan"),
        (samplers.Weighted("nowhere.npy"), "nowhere.npy"),
        (lambda _, __, n: np.arange(n - 1), "gives int64 [59] for epoch 0"),
        (lambda _, __, n: np.arange(n) + 1, "gives the samples 1 to 60 of 60"),
        (lambda _, __, n: np.random.default_rng().permutation(n), "another order when it is called again"),
        (lambda *_: 1 / 0, "failed for epoch 0: ZeroDivisionError"),
        (3, "is a int"),
    ],
)
def test_what_is_no_order_is_refused(sampler: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        order_of(sampler)
    assert words in str(caught.value)


@pytest.mark.parametrize(("sampler", "name"), [(samplers.Weighted, "weights"), (samplers.ByLength, "lengths")])
def test_numbers_that_nobody_gave_are_named(sampler: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=f"the data set has no attribute {name}"):
        order_of(sampler(), data=adapt(Bare()))
    with pytest.raises(ConfigError, match="attribute `labels`"):
        order_of(samplers.ClassBalanced(), data=adapt(Bare()))
    with pytest.raises(ConfigError, match="window=0"):
        samplers.ByLength(window=0)
