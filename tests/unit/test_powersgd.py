"""PowerSGD against its paper's algorithm in NumPy, and what error feedback promises: nothing is lost."""

import threading

import numpy as np
import torch
from torch import nn

from descent.training.collectives import Group
from descent.training.reduction.compressed import RANK, Compressed
from descent.training.reduction.losses import LossOf
from descent.training.results import MicroBatchLoss

GROUP = Group(0, 1, torch.device("cpu"), threading.Event())
ONE = torch.tensor(1.0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 40, 25), nn.Flatten(), nn.Linear(40, 30, bias=True)).double()


def squares_of(model: nn.Module) -> LossOf:
    """The loss: the sum of the squares of the outputs."""
    return lambda batch, samples: MicroBatchLoss(model(batch).square().sum(), len(samples))


def delivered(reducer: Compressed, model: nn.Module, batch: torch.Tensor) -> dict[str, np.ndarray]:
    """The gradients of one step as the optimizer sees them."""
    reducer.begin_step()
    reducer.backward(reducer.forward(batch, range(len(batch)), last=True).total, ONE, last=True)
    reducer.finish_step()
    return {n: p.grad.detach().numpy().copy() for n, p in model.named_parameters()}


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 2, 25, generator=generator).double() for _ in range(count)]


def true_gradients(model: nn.Module, batch: torch.Tensor) -> dict[str, np.ndarray]:
    found = torch.autograd.grad(model(batch).square().sum(), list(model.parameters()))
    return {n: g.numpy() for (n, _), g in zip(model.named_parameters(), found, strict=True)}


def projector(p: np.ndarray) -> np.ndarray:
    """Onto the columns of p, whatever basis of them."""
    u, _, _ = np.linalg.svd(p, full_matrices=False)
    return u @ u.T


def test_it_is_the_algorithm_of_the_paper() -> None:
    model = network()
    reducer = Compressed(model, squares_of(model), GROUP, "powersgd")
    names = ["0.weight", "2.weight"]
    q = {m.gradient.shape: m.q.numpy().copy() for ms in reducer._codec._matrices for m in ms}
    error = {name: np.zeros(1) for name in names}
    for batch in batches(6):
        truth = true_gradients(model, batch)
        found = delivered(reducer, model, batch)
        for name in names:
            m = truth[name].reshape(truth[name].shape[0], -1) + error[name]
            taken = projector(m @ q[m.shape]) @ m  # P Pᵀ M, with P a basis of M Q
            np.testing.assert_allclose(found[name].reshape(m.shape), taken, rtol=1e-8, atol=1e-8)
            assert np.linalg.matrix_rank(taken) <= RANK
            error[name] = m - taken
            q[m.shape] = np.linalg.svd(taken)[2][:RANK].T  # the same space as Mᵀ P
        for name in ("0.bias", "2.bias"):
            np.testing.assert_array_equal(found[name], truth[name])


def test_what_a_message_leaves_out_comes_with_later_ones() -> None:
    model = network()
    reducer = Compressed(model, squares_of(model), GROUP, "powersgd")
    sent = given = np.zeros((30, 40))
    for batch in batches(10):
        given = given + true_gradients(model, batch)["2.weight"]
        sent = sent + delivered(reducer, model, batch)["2.weight"]
    left = [m.error.numpy() for ms in reducer._codec._matrices for m in ms if m.error.shape == (30, 40)]
    np.testing.assert_allclose(sent + left[0], given, rtol=1e-9, atol=1e-9)


def test_a_step_that_was_not_committed_leaves_nothing_behind() -> None:
    model, fresh = network(), network()
    reducer = Compressed(model, squares_of(model), GROUP, "powersgd")
    first, second = batches(2)
    spoilt = first.clone()
    spoilt[0, 0, 0] = float("nan")
    delivered(reducer, model, second)
    assert np.isnan(delivered(reducer, model, spoilt)["2.weight"]).any()
    reducer.nonfinite_ranks()
    again = delivered(reducer, model, first)
    expected = delivered(Compressed(fresh, squares_of(fresh), GROUP, "powersgd"), fresh, first)
    for name, gradient in expected.items():
        np.testing.assert_array_equal(again[name], gradient)
