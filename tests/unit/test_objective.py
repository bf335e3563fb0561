"""Sum and count give torch's own mean, however the batch is cut."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from descent.errors import DescentError
from descent.training.objective import Objective


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(3))


def signs(*shape: int) -> Tensor:
    return labels(2, *shape) * 2.0 - 1.0


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0])
ignoring = labels(4, 9)
ignoring[::2] = -100
CASES: dict[str, tuple[nn.Module, Tensor, Tensor]] = {
    "mse": (nn.MSELoss(), values(9, 3), values(9, 3, seed=1)),
    "mse of one value": (nn.MSELoss(), values(9), values(9, seed=1)),
    "l1": (nn.L1Loss(), values(9, 3, 2), values(9, 3, 2, seed=1)),
    "huber": (nn.HuberLoss(delta=0.3), values(9, 3), values(9, 3, seed=1)),
    "smooth l1": (nn.SmoothL1Loss(), values(9, 3), values(9, 3, seed=1)),
    "bce": (nn.BCELoss(), values(9, 3).sigmoid(), values(9, 3, seed=1).sigmoid()),
    "bce with logits": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0])),
        values(9, 3),
        labels(2, 9, 3).float(),
    ),
    "poisson": (nn.PoissonNLLLoss(), values(9, 3), values(9, 3, seed=1).abs()),
    "kl, by element": (nn.KLDivLoss(), values(9, 3).log_softmax(1), values(9, 3, seed=1).softmax(1)),
    "kl, by sample": (
        nn.KLDivLoss(reduction="batchmean"),
        values(9, 3).log_softmax(1),
        values(9, 3, seed=1).softmax(1),
    ),
    "soft margin": (nn.SoftMarginLoss(), values(9, 3), signs(9, 3)),
    "hinge embedding": (nn.HingeEmbeddingLoss(), values(9, 3), signs(9, 3)),
    "multi-margin": (nn.MultiMarginLoss(), values(9, 4), labels(4, 9)),
    "multi-label margin": (nn.MultiLabelMarginLoss(), values(9, 4), torch.tensor([[2, 0, -1, 1]] * 9)),
    "multi-label soft margin": (nn.MultiLabelSoftMarginLoss(), values(9, 4), labels(2, 9, 4).float()),
    "nll": (nn.NLLLoss(), values(9, 4).log_softmax(1), labels(4, 9)),
    "cross entropy": (nn.CrossEntropyLoss(), values(9, 4), labels(4, 9)),
    "class probabilities": (nn.CrossEntropyLoss(), values(9, 4), values(9, 4, seed=1).softmax(1)),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), values(9, 4), labels(4, 9)),
    "ignored labels": (nn.CrossEntropyLoss(), values(9, 4), ignoring),
    "another label is ignored": (nn.CrossEntropyLoss(ignore_index=2), values(9, 4), labels(4, 9)),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), values(9, 4), labels(4, 9)),
    "class weights, ignored labels": (nn.CrossEntropyLoss(weight=WEIGHT), values(9, 4), ignoring),
    "class weights, smoothing": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2), values(9, 4), labels(4, 9)),
    "nll, class weights": (nn.NLLLoss(weight=WEIGHT), values(9, 4).log_softmax(1), labels(4, 9)),
    "pixels": (nn.CrossEntropyLoss(), values(9, 4, 5, 6), labels(4, 9, 5, 6)),
    "pixels, one ignored": (nn.CrossEntropyLoss(ignore_index=1), values(9, 4, 5, 6), labels(4, 9, 5, 6)),
}


@given(cuts=st.lists(st.integers(0, 9), max_size=4))
@pytest.mark.parametrize("name", CASES)
def test_sums_and_counts_over_uneven_shares_give_the_mean(name: str, cuts: list[int]) -> None:
    loss, output, target = CASES[name]
    wanted = loss(output, target)
    objective = Objective.of(loss)
    edges = sorted({0, 9, *cuts})
    for loss_of_it in (objective, objective.over(target)):
        total, count = 0.0, 0.0
        for lo, hi in itertools.pairwise(edges):
            part = loss_of_it(output[lo:hi], target[lo:hi])
            total += float(part.total)
            count += float(part.terms)
        assert total / count == pytest.approx(float(wanted), rel=1e-5)


def test_labels_in_bytes_are_looked_through_for_the_ignored_one() -> None:
    stored = torch.tensor([0, 156, 9], dtype=torch.uint8)  # 156 is -100 in a byte
    assert Objective.of(nn.CrossEntropyLoss()).over(stored).all_count
    assert not Objective.of(nn.CrossEntropyLoss(ignore_index=9)).over(stored).all_count


def test_tokens_are_rows() -> None:
    output, target = values(3, 5, 7), labels(7, 3, 5)
    objective = Objective.of(nn.CrossEntropyLoss())
    wanted = nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="sum")
    assert torch.equal(objective(output, target).total, wanted)
    assert objective(output, target).terms == 15
    assert int(objective.num_correct(output, target)) == int((output.argmax(-1) == target).sum())


def test_correct_pixels_are_counted_along_the_classes_and_without_the_ignored() -> None:
    output, target = values(3, 4, 5, 6), labels(4, 3, 5, 6)
    right = output.argmax(1) == target
    assert int(Objective.of(nn.CrossEntropyLoss()).num_correct(output, target)) == int(right.sum())
    ignoring_two = Objective.of(nn.CrossEntropyLoss(ignore_index=2))
    assert int(ignoring_two.num_correct(output, target)) == int((right & (target != 2)).sum())


def test_any_other_callable_is_a_mean_over_samples() -> None:
    objective = Objective.of(lambda output, target: (output - target).abs().mean())
    output, target = values(6, 2), values(6, 2, seed=1)
    parts = [objective(output[:4], target[:4]), objective(output[4:], target[4:])]
    mean = sum(float(p.total) for p in parts) / sum(int(p.terms) for p in parts)
    assert mean == pytest.approx(float((output - target).abs().mean()), rel=1e-6)


@pytest.mark.parametrize(("output", "target"), [((8, 1), (8,)), ((8,), (8, 1)), ((8, 1, 3), (8, 3))])
@pytest.mark.parametrize("kind", [nn.MSELoss, nn.L1Loss, nn.BCEWithLogitsLoss])
def test_a_dimension_of_one_is_not_broadcast(
    kind: type[nn.Module], output: tuple[int, ...], target: tuple[int, ...]
) -> None:
    given, wanted = values(*output), values(*target, seed=1).sigmoid()
    objective = Objective.of(kind())
    assert float(objective(given, wanted).total) == pytest.approx(
        float(kind(reduction="sum")(given.view(target), wanted)), rel=1e-6
    )


@pytest.mark.parametrize(
    ("output", "target"),
    [((8, 8), (8,)), ((8, 3), (8, 1)), ((8, 3), (8,)), ((8, 2, 3), (8, 3, 2)), ((8, 1), (8, 3)), ((8, 6), (8, 2, 3))],
)
def test_what_would_broadcast_or_be_cut_anew_is_refused(output: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(DescentError, match=r"\[8.*\].*\[8.*\]"):
        Objective.of(nn.MSELoss())(values(*output), values(*target))


def test_a_loss_without_one_number_is_refused() -> None:
    with pytest.raises(DescentError, match="reduction=none"):
        Objective.of(nn.MSELoss(reduction="none"))
    with pytest.raises(DescentError, match="can't be called"):
        Objective.of(3)
