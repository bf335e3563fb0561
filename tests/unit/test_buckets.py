"""Where gradients lie in the flat buffer: for any number of ranks at the same places within a cache line."""

import pytest
import torch
from torch import nn

from descent.training.reduction import buckets
from descent.training.reduction.buckets import FlatBuckets


def test_a_gradient_is_aligned_alike_for_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 400)
    model = nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 5), nn.Linear(5, 31))
    for pieces in range(1, 9):
        flat = FlatBuckets(model, pieces, lambda _: None)
        assert len(flat.bounds) > 2
        for lo, hi in flat.bounds:
            assert (hi - lo) % pieces == 0
        for parameter in model.parameters():
            assert parameter.grad is not None and parameter.grad.data_ptr() % 64 == 0
        flat.close()


def test_gradients_in_the_buffer_are_those_of_autograd() -> None:
    model, batch = nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 5)), torch.randn(4, 7)
    expected = torch.autograd.grad(model(batch).sum(), list(model.parameters()))
    flat = FlatBuckets(model, 3, lambda _: None)
    model(batch).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)
    assert flat.flat.count_nonzero() == sum(int(g.count_nonzero()) for g in expected)
    flat.close()
