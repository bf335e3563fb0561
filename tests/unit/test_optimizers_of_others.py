"""Optimizers of other packages: all of their state is saved, wherever they keep it, and their use is their package's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from descent.errors import ConfigError
from descent.optim.ema import Ema
from descent.optim.modes import as_evaluated
from descent.optim.optimizers import build_optimizer, load_named_state, named_state
from descent.training.state import TrainState

CPU = torch.device("cpu")
STEPS = 6


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv:2302.06675, as it is often copied into a project."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = state["exp_avg"].lerp(p.grad, 1 - group["betas"][0]).sign_()
                p.add_(update, alpha=-group["lr"])
                state["exp_avg"].lerp_(p.grad, 1 - group["betas"][1])


class Estimating(torch.optim.Optimizer):
    """Like Prodigy it keeps what it estimates in the group: a number, a tensor and a list."""

    def __init__(self, params: Any, lr: float = 1.0):
        super().__init__(params, {"lr": lr, "d": 1e-6, "total": torch.zeros(()), "last": [0.0, 0.0], "begun": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            norm = sum(float(p.grad.norm()) for p in group["params"])
            group["total"] += norm
            group["last"] = [group["last"][1], norm]
            group["d"] = max(group["d"], 1e-3 * float(group["total"]) / (1 + sum(group["last"])))
            group["begun"] = True
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] * group["d"])


class Remembering(torch.optim.Optimizer):
    """Keeps its last gradients in containers, as quasi-Newton methods do."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                past = state.setdefault("past", [])
                past.append(p.grad.clone())
                del past[:-3]
                state["inner"] = {"mean": sum(past) / len(past), "span": (len(past), None), "nothing": []}
                p.add_(state["inner"]["mean"], alpha=-group["lr"])


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "schedule-free AdamW": (schedulefree.AdamWScheduleFree, {"lr": 0.02, "warmup_steps": 3}),
    "schedule-free SGD": (schedulefree.SGDScheduleFree, {"lr": 0.2}),
    "schedule-free RAdam": (schedulefree.RAdamScheduleFree, {"lr": 0.02}),
    "Adafactor": (transformers.optimization.Adafactor, {"lr": 0.02, "relative_step": False, "beta1": 0.9}),
    "Lion": (Lion, {"lr": 0.01}),
    "Estimating": (Estimating, {"lr": 1.0}),
    "Remembering": (Remembering, {"lr": 0.1}),
}
each = pytest.mark.parametrize("name", OPTIMIZERS)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def _train(model: nn.Module, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), inputs.argmax(1) % 3)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _built(name: str, model: nn.Module) -> torch.optim.Optimizer:
    cls, options = OPTIMIZERS[name]
    return build_optimizer(model, cls, {"weight_decay": 0.0, **options}, CPU)


def _same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@each
def test_the_losses_are_those_of_the_packages_own_use(name: str) -> None:
    model, reference = _model(), _model()
    cls, options = OPTIMIZERS[name]
    own = cls(reference.parameters(), **options)
    if hasattr(own, "train"):
        own.train()
    losses = _train(model, _built(name, model), range(STEPS))
    assert losses == _train(reference, own, range(STEPS))
    assert losses[-1] != losses[0]


@each
@pytest.mark.parametrize("after", range(STEPS))
def test_resumed_after_any_step_it_goes_on_with_the_same_bits(name: str, after: int, tmp_path: Path) -> None:
    whole = _model()
    uninterrupted = _built(name, whole)
    _train(whole, uninterrupted, range(after))
    save_file({n: t.clone() for n, t in named_state(uninterrupted).items()}, tmp_path / "optimizer.safetensors")
    weights = {n: t.clone() for n, t in whole.state_dict().items()}
    _train(whole, uninterrupted, range(after, STEPS))

    resumed = _model()
    optimizer = _built(name, resumed)
    _train(resumed, optimizer, range(3))  # what was there before goes
    resumed.load_state_dict(weights)
    saved = load_file(tmp_path / "optimizer.safetensors")
    load_named_state(optimizer, saved)
    assert _same_bits(named_state(optimizer), saved)
    _train(resumed, optimizer, range(after, STEPS))
    assert _same_bits(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert _same_bits(named_state(optimizer), named_state(uninterrupted))


def test_numbers_of_a_group_are_named_after_its_first_parameter_and_torchs_own_groups_have_none() -> None:
    model = _model()
    optimizer = _built("Estimating", model)
    _train(model, optimizer, range(2))
    names = {n for n in named_state(optimizer) if "/group." in n and n.startswith("0.bias")}
    assert names == {
        "0.bias/group." + key for key in ("d:float", "total", "last[0]:float", "last[1]:float", "begun:bool")
    }
    for cls in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.RMSprop):
        optimizer = build_optimizer(_model(), cls, {"lr": 0.1}, CPU)
        optimizer.step()
        assert not any("/group." in name for name in named_state(optimizer))


class CountsOnItself(Lion):
    count = 0

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.count += 1


class CountsBesideParameters(Lion):
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.state["count"] = self.state.get("count", 0) + 1


@pytest.mark.parametrize(("cls", "kept"), [(CountsOnItself, "'count'"), (CountsBesideParameters, "state")])
def test_numbers_that_nothing_could_save_are_refused_by_name(cls: Callable[..., Any], kept: str) -> None:
    with pytest.raises(ConfigError, match=rf"{cls.__name__}: keeps .*{kept}.*param_groups"):
        build_optimizer(_model(), cls, {"lr": 0.1}, CPU)


# -- two modes --------------------------------------------------------------------------


def _by_hand(steps: int) -> tuple[nn.Sequential, Any]:
    model = _model()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.02, warmup_steps=3)
    optimizer.train()
    _train(model, optimizer, range(steps))
    return model, optimizer


def test_what_is_evaluated_is_what_eval_gives_and_leaves_no_trace() -> None:
    model, reference = _model(), _by_hand(4)
    optimizer = _built("schedule-free AdamW", model)
    _train(model, optimizer, range(4))
    state = TrainState(model, optimizer, lambda _: 1.0)
    before = state.sha256()
    reference[1].eval()
    with state.averaged():
        assert _same_bits(dict(model.state_dict()), dict(reference[0].state_dict()))
    assert {n: t.tolist() for n, t in state.evaluated_weights().items()} == {
        f"ema/{n}": p.tolist() for n, p in reference[0].named_parameters()
    }
    assert state.sha256() == before
    assert _train(model, optimizer, range(4, 6)) == _train(*_by_hand(4), range(4, 6))


def test_an_average_is_taken_of_the_weights_that_eval_gives() -> None:
    model = _model()
    optimizer = _built("schedule-free AdamW", model)
    state = TrainState(model, optimizer, lambda _: 1.0, Ema(model, 0.5))
    expected = Ema(_model(), 0.5)
    for step in range(3):
        _train(model, optimizer, range(step, step + 1))
        state.average(step)
        reference, own = _by_hand(step + 1)
        own.eval()
        expected.update(reference, step)
    with state.averaged():
        assert {n: p.tolist() for n, p in model.named_parameters()} == {
            n: t.tolist() for n, t in expected.shadow.items()
        }
    assert not state.evaluated_weights()


def test_an_optimizer_without_modes_is_left_as_it_is() -> None:
    model = _model()
    optimizer = build_optimizer(model, torch.optim.Adam, {"lr": 0.1}, CPU)
    weights = [p.detach().clone() for p in model.parameters()]
    with as_evaluated(optimizer):
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
