"""The average of the weights against torch's AveragedModel and its own formula."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from descent.errors import ConfigError
from descent.optim.ema import Ema


class Net(nn.Module):
    """A network with a tied weight, a frozen weight, and a batch norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 5)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)))


def _train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(1000 + step)
        tokens = torch.randint(5, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), (tokens + 1) % 5).backward()
        optimizer.step()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def _assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@settings(deadline=None, max_examples=20)
@given(st.floats(0.1, 0.999), st.integers(1, 4))
def test_a_constant_decay_averages_as_torchs_averaged_model(decay: float, steps: int) -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    ema = Ema(model, decay, warm_up=False)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    reference.update_parameters(model)  # torch's first update copies
    for step in range(steps):
        _train(model, optimizer, range(step, step + 1))
        ema.update(model, step)
        reference.update_parameters(model)
    theirs = dict(reference.module.named_parameters())
    _assert_same_bits(ema.shadow, {n: theirs[n].detach() for n in ema.shadow})


def test_the_decay_warms_up_with_the_step() -> None:
    ema = Ema(Net(), 0.9)
    assert [ema.decay_at(s) for s in (0, 10, 80, 1000)] == [1 / 10, 11 / 20, 0.9, 0.9]
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
        ema = Ema(model, 0.999)
        model.weight.fill_(1.0)
        ema.update(model, 0)
        assert float(ema.shadow["weight"]) == pytest.approx(0.9)
        ema.update(model, 1)
        assert float(ema.shadow["weight"]) == pytest.approx(0.9 + 0.1 * (1 - 2 / 11))


def test_swapped_exchanges_the_averages_and_restores_the_weights() -> None:
    model = Net()
    ema = Ema(model, 0.9)
    _train(model, torch.optim.SGD(model.parameters(), lr=0.5), range(2))
    raw, average = _weights(model), {n: t.clone() for n, t in ema.shadow.items()}
    identities = [id(p) for p in model.parameters()]

    def fail_inside() -> None:
        with ema.swapped(model):
            _assert_same_bits({n: t for n, t in _weights(model).items() if n in average}, average)
            assert model.head.weight is model.embed.weight
            raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        fail_inside()
    _assert_same_bits(_weights(model), raw)
    _assert_same_bits(ema.shadow, average)
    assert [id(p) for p in model.parameters()] == identities


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"ema\.decay="):
        Ema(Net(), decay)
