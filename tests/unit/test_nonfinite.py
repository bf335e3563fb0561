"""The search for what is not finite in a step: layers, samples, and what is said about them."""

import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from descent.training import nonfinite
from descent.training.buffers import Buffers
from descent.training.collectives import Group
from descent.training.objective import Objective
from descent.training.step import StepInput, StepResult, micro_batches
from descent.training.task import Supervised

GROUP = Group(0, 1, torch.device("cpu"), threading.Event())
SAMPLES = np.arange(100, 112)


class Root(nn.Module):
    """Its value is finite at 0, its slope is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0.0).sqrt()


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.root = Root()
        self.last = nn.Linear(3, 1)
        nn.init.eye_(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.root(self.first(x)))


def inspect(model: nn.Module, inputs: Tensor, loss: object = None) -> list[nonfinite.Finding]:
    """What is found in 12 samples in 2 slots of 3 and 9, micro-batches of 4."""
    targets = torch.zeros(len(inputs), 1)
    given = StepInput(5, micro_batches([(0, (0, 3)), (1, (3, 12))], 4), (0, 0), (5.0, 0.0, 0.0))
    inspector = nonfinite.Inspector(
        model,
        Supervised(Objective.of(loss or nn.MSELoss())),
        Buffers(model, ()),
        0,
        torch.tensor(1 / 12),
        False,
    )
    return inspector.inspect(given, lambda a, b: (inputs[a:b], targets[a:b]), SAMPLES)


@pytest.fixture
def inputs() -> Tensor:
    return torch.rand(12, 3, generator=torch.Generator().manual_seed(0)) + 0.5


def test_nothing_is_found_where_all_is_well(inputs: Tensor) -> None:
    assert inspect(Network(), inputs) == []


def test_an_input(inputs: Tensor) -> None:
    inputs[7, 1] = float("inf")
    (found,) = inspect(Network(), inputs)
    assert (found["slot"], found["samples"], found["bad"], found["of"]) == (1, [107], 1, 9)
    assert found["inputs"] and found["layers"] == ["first", "last"]


def test_a_loss_and_an_output(inputs: Tensor) -> None:
    model, inputs[2] = Network(), 3e38
    nn.init.ones_(model.last.weight)
    assert model(inputs).isfinite().all()  # about 5e19: only its square overflows
    (found,) = inspect(model, inputs)
    assert (found["slot"], found["samples"], found["inputs"]) == (0, [102], False)
    model.last.weight.data = torch.tensor([[3e19, 0.0, 0.0]])
    assert model(inputs).isfinite().sum() == 11
    (found,) = inspect(model, inputs, nn.L1Loss())
    assert (found["slot"], found["samples"], found["inputs"]) == (0, [102], False)


def test_a_gradient_alone(inputs: Tensor) -> None:
    inputs[9, 0] = 0.0  # the root's slope there is infinite
    model = Network()
    assert model(inputs).isfinite().all()
    (found,) = inspect(model, inputs)
    assert (found["slot"], found["samples"], found["loss"] != "nan") == (1, [109], True)
    assert found["layers"] == ["first"]


def test_all_samples_of_a_slot(inputs: Tensor) -> None:
    model = Network()
    with torch.no_grad():
        model.last.bias.fill_(float("nan"))
    found = inspect(model, inputs)
    assert [(f["bad"], f["of"], len(f["samples"])) for f in found] == [(3, 3, 3), (9, 9, 8)]
    answers = nonfinite.exchange(GROUP, (), found)
    first = StepResult(float("nan"), 1.0, False, (0, 0), (float("nan"),) * 2)
    notice = nonfinite.notice(5, 1, ((0, 2),), first, False, answers)
    assert "all 9 samples" in notice.detail and "…" in notice.detail
    assert notice.rank == 0


def test_a_search_that_fails_is_said_and_ends_nothing(inputs: Tensor) -> None:
    def fussy(out: Tensor, target: Tensor) -> Tensor:
        if len(out) == 1:
            raise ValueError("no batches of one")
        return (out - target).mean() * float("nan")

    found = inspect(Network(), inputs, fussy)
    answers = nonfinite.exchange(GROUP, (), found)
    first = StepResult(float("nan"), 1.0, False, (0, 0), (float("nan"),) * 2)
    assert "no batches of one" in nonfinite.notice(5, 1, ((0, 2),), first, False, answers).detail


def test_what_is_exchanged_has_a_bound() -> None:
    layers = [f"{'módule.' * 20}{n}" for n in range(500)]
    found = [
        {"slot": s, "loss": "nan", "layers": layers, "samples": [10**12] * 8, "bad": 9, "of": 9, "inputs": False}
        for s in range(1000)
    ]
    (answer,) = nonfinite.exchange(GROUP, (0,), found)
    assert answer["suspects"] == [0] and 0 < len(answer["slots"]) <= 8
    assert answer["more"] == 1000 - len(answer["slots"])
    first = StepResult(float("nan"), 1.0, False, (0, 0), (float("nan"),) * 1000)
    notice = nonfinite.notice(5, 1, ((0, 1000),), first, False, [answer])
    assert f"and {1000 - len(answer['slots'])} more slots" in notice.detail


def test_a_sum_that_overflows_though_no_slot_does() -> None:
    first = StepResult(1.0, float("inf"), False, (0, 0), (1.0, 1.0))
    answers = nonfinite.exchange(GROUP, (), [])
    assert "overflows" in nonfinite.notice(5, 1, ((0, 2),), first, False, answers).detail
