"""Compares the optimizers with torch's own, built by hand, and saves and loads their state."""

import copy
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from descent.errors import CheckpointError, ConfigError
from descent.optim.muon import hidden_weights
from descent.optim.optimizers import (
    MuonWithAdamW,
    build_optimizer,
    load_named_state,
    named_state,
    parameter_groups,
)

CPU = torch.device("cpu")
FOLDER = Path(__file__).parents[2] / "configs" / "optimizer"
CONFIGS = sorted(p for p in FOLDER.glob("*.yaml") if p.stem != "custom")
FUSED_ON_CPU = {"sgd", "momentum", "nesterov", "adam", "adamw", "adagrad"}
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
property_test = settings(deadline=None, max_examples=60)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small are computed faster by one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """A small network with one parameter of each kind that groups distinguish.

    It is 37 wide, so that vectorized kernels have a remainder.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 37)
        self.conv = nn.Conv1d(37, 37, 3, padding=1)
        self.norm = nn.LayerNorm((37, 4))
        self.hidden = nn.Linear(37, 37)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(37, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.out = nn.Linear(11, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embed(tokens).transpose(1, 2))).mean(-1)
        return self.out(self.head(torch.relu(self.hidden(x)) * self.scale))


NO_DECAY = {"conv.bias", "norm.weight", "norm.bias", "hidden.bias", "scale", "out.bias"}
DECAY = {"embed.weight", "conv.weight", "hidden.weight", "out.weight"}


def _train(model: nn.Module, optimizer: Any, steps: range) -> None:
    """Make the steps `steps`; `optimizer` is an optimizer or a list of them."""
    many = optimizer if isinstance(optimizer, list) else [optimizer]
    for step in steps:
        torch.manual_seed(1000 + step)
        tokens = torch.randint(11, (8, 4))
        loss = nn.functional.cross_entropy(model(tokens), tokens.sum(1) % 3)
        for one in many:
            one.zero_grad()
        loss.backward()
        for one in many:
            one.step()


def _options(path: Path) -> tuple[Any, dict[str, Any]]:
    options = yaml.safe_load(path.read_text())
    module, _, name = options.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name), options


def _named(model: nn.Module, names: set[str]) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if n in names]


def _by_hand(path: Path, model: nn.Module) -> list[torch.optim.Optimizer]:
    """torch's own optimizers for the config at `path`, built as in torch's documentation."""
    cls, options = _options(path)
    for key in ("groups", "decay_norm_and_bias"):
        options.pop(key)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    if path.stem == "muon":
        shared = {k: options.pop(k) for k in ("lr", "weight_decay")}
        adamw = {k: options.pop(k) for k in ("betas", "eps")}
        rest = [
            {"params": _named(model, {"embed.weight", "conv.weight", "out.weight"})},
            {"params": _named(model, NO_DECAY), "weight_decay": 0.0},
        ]
        return [
            torch.optim.Muon(_named(model, {"hidden.weight"}), **shared, **options),
            torch.optim.AdamW(rest, fused=True, **shared, **adamw),
        ]
    groups = [
        {"params": _named(model, DECAY)},
        {"params": _named(model, NO_DECAY), "weight_decay": 0.0},
    ]
    fused = {"fused": True} if path.stem in FUSED_ON_CPU else {}
    return [cls(groups, **options, **fused)]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def _assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.device == other[name].device, name
        assert torch.equal(tensor, other[name]), name


@every_config
def test_twenty_steps_are_torchs_own_bit_for_bit(path: Path) -> None:
    model, reference = Net(), Net()
    cls, options = _options(path)
    start = _weights(model)
    optimizer = build_optimizer(model, cls, options, CPU)
    _train(model, optimizer, range(20))
    _train(reference, _by_hand(path, reference), range(20))
    _assert_same_bits(_weights(model), _weights(reference))
    assert not torch.equal(start["hidden.weight"], model.hidden.weight)


@every_config
@pytest.mark.parametrize("kernel", ["fused", "foreach", "neither"])
def test_a_load_in_the_middle_goes_on_with_the_same_bits(path: Path, kernel: str) -> None:
    cls, options = _options(path)
    if kernel == "fused" and path.stem not in FUSED_ON_CPU | {"muon"}:
        with pytest.raises(ConfigError, match=r"optimizer\.fused"):
            build_optimizer(Net(), cls, {**options, "fused": True}, CPU)
        return
    options |= {
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "neither": {"foreach": False},
    }[kernel]
    whole = Net()
    uninterrupted = build_optimizer(whole, cls, options, CPU)
    _train(whole, uninterrupted, range(6))
    saved = {n: t.clone() for n, t in named_state(uninterrupted).items()}
    weights = _weights(whole)
    _train(whole, uninterrupted, range(6, 12))

    resumed = Net(seed=1)
    resumed.load_state_dict(weights | {"head.weight": weights["embed.weight"]})
    optimizer = build_optimizer(resumed, cls, options, CPU)
    # In another order than the saved one's: only the names matter.
    optimizer.param_groups.reverse()
    for group in optimizer.param_groups:
        group["params"].reverse()
        group["param_names"].reverse()
    load_named_state(optimizer, saved)
    _assert_same_bits(named_state(optimizer), saved)
    _train(resumed, optimizer, range(6, 12))
    _assert_same_bits(_weights(resumed), _weights(whole))
    _assert_same_bits(named_state(optimizer), named_state(uninterrupted))


@every_config
def test_loading_replaces_the_former_state(path: Path) -> None:
    cls, options = _options(path)
    ahead, behind = Net(), Net()
    source = build_optimizer(ahead, cls, options, CPU)
    target = build_optimizer(behind, cls, options, CPU)
    _train(ahead, source, range(4))
    _train(behind, target, range(3))
    behind.load_state_dict(ahead.state_dict())
    load_named_state(target, named_state(source))
    _train(ahead, source, range(4, 6))
    _train(behind, target, range(4, 6))
    _assert_same_bits(_weights(behind), _weights(ahead))
    fresh = build_optimizer(Net(), cls, options, CPU)
    before_the_first_step = named_state(fresh)
    load_named_state(target, before_the_first_step)
    _assert_same_bits(named_state(target), before_the_first_step)


class Counting(torch.optim.Optimizer):
    """Keeps Python numbers in its state, as optimizers of other libraries do."""

    def __init__(self, params: Any, lr: float = 0.1, keep: Any = 0) -> None:
        super().__init__(params, {"lr": lr, "keep": keep})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["rate"] = group["lr"] / 3
                state["odd"] = state["count"] % 2 == 1
                if group["keep"]:
                    state["kept"] = {1}


def test_python_numbers_in_the_state_are_restored_with_their_type() -> None:
    optimizer = build_optimizer(Net(), Counting, {"lr": 0.1}, CPU)
    _train(Net(), optimizer, range(3))
    saved = named_state(optimizer)
    assert saved["hidden.bias/count:int"].shape == ()
    target = build_optimizer(Net(), Counting, {"lr": 0.1}, CPU)
    load_named_state(target, saved)
    state = target.state[target.param_groups[0]["params"][0]]
    assert state == {"count": 3, "rate": 0.1 / 3, "odd": True}
    assert [type(v) for v in state.values()] == [int, float, bool]


def test_a_state_that_cannot_be_tensors_is_refused() -> None:
    """Before the run, by a trial step."""
    with pytest.raises(ConfigError, match="Counting: keeps a set as its state 'kept'"):
        build_optimizer(Net(), Counting, {"lr": 0.1, "keep": 1}, CPU)


def test_a_state_of_another_model_is_refused() -> None:
    optimizer = build_optimizer(Net(), torch.optim.Adam, {"lr": 0.1}, CPU)
    with pytest.raises(CheckpointError, match=r"nobody\.weight/step"):
        load_named_state(optimizer, {"nobody.weight/step": torch.tensor(1.0)})


def test_state_keeps_the_layout_of_its_parameter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, torch.optim.Adam, {"lr": 0.1}, CPU)
    flat = torch.arange(108.0).view(4, 3, 3, 3)
    load_named_state(optimizer, {"0.weight/exp_avg": flat})
    kept = optimizer.state[model[0].weight]["exp_avg"]
    assert kept.stride() == model[0].weight.stride()
    assert torch.equal(kept, flat)


# Groups


def test_biases_norms_and_scales_are_not_decayed_and_a_tied_weight_counts_once() -> None:
    groups = parameter_groups(Net(), 0.1, 0.5)
    by_decay = {g["weight_decay"]: {n for n, _ in g["params"]} for g in groups}
    assert by_decay == {0.5: DECAY, 0.0: NO_DECAY}
    (everything,) = parameter_groups(Net(), 0.1, 0.5, decay_norm_and_bias=True)
    assert [n for n, _ in everything["params"]] == [n for n, p in Net().named_parameters() if p.requires_grad]


NAMES = sorted(DECAY | NO_DECAY)
PATTERNS = st.sampled_from(["bias$", "weight", r"^conv\.", "norm|scale", "embed", "head", ".", r"hidden\.weight"])
ENTRIES = st.lists(
    st.fixed_dictionaries(
        {"match": PATTERNS},
        optional={
            "lr_scale": st.sampled_from([0.1, 1.0]),
            "weight_decay": st.sampled_from([0.0, 0.3]),
        },
    ),
    max_size=3,
)


@property_test
@given(ENTRIES, st.sampled_from([0.0, 0.01]), st.booleans())
def test_groups_are_a_partition_in_the_models_order(
    entries: list[dict[str, Any]], decay: float, decay_all: bool
) -> None:
    model = Net()
    names = [
        {n for n, p in model.named_parameters(remove_duplicate=False) if re.search(e["match"], n)} for e in entries
    ]
    # An entry is of use if it reaches a parameter (head.weight is embed.weight) before others.
    reached = [{n.replace("head.", "embed.") for n in found} & set(NAMES) for found in names]
    if any(not own - set().union(*reached[:i]) for i, own in enumerate(reached)):
        with pytest.raises(ConfigError, match="an earlier entry takes every parameter"):
            parameter_groups(model, 0.1, decay, groups=entries)
        return
    groups = parameter_groups(model, 0.1, decay, decay_norm_and_bias=decay_all, groups=entries)
    order = [n for n, p in model.named_parameters() if p.requires_grad]
    placed = [n for g in groups for n, _ in g["params"]]
    assert sorted(placed) == sorted(order)
    for group in groups:
        indices = [order.index(n) for n, _ in group["params"]]
        assert indices == sorted(indices)
    firsts = [order.index(g["params"][0][0]) for g in groups]
    assert firsts == sorted(firsts)
    options = [{k: v for k, v in g.items() if k != "params"} for g in groups]
    assert all(a != b for i, a in enumerate(options) for b in options[:i])


def test_the_first_entry_that_matches_wins_and_keeps_its_rate_for_the_schedule() -> None:
    entries = [
        {"match": r"^hidden\.weight", "lr_scale": 0.5, "betas": [0.8, 0.9]},
        {"match": "hidden|head", "lr": 0.7, "weight_decay": 0.25},
    ]
    options = {"lr": 0.1, "weight_decay": 0.5, "groups": entries, "betas": [0.9, 0.95]}
    optimizer = build_optimizer(Net(), torch.optim.AdamW, options, CPU)
    at = {n: g for g in optimizer.param_groups for n in g["param_names"]}
    assert (at["hidden.weight"]["lr"], at["hidden.weight"]["betas"]) == (0.05, (0.8, 0.9))
    assert (at["hidden.bias"]["lr"], at["hidden.bias"]["weight_decay"]) == (0.7, 0.25)
    # Reached by the second name of a tied weight, grouped under the first.
    assert at["embed.weight"] is at["hidden.bias"]
    assert at["conv.weight"]["betas"] == (0.9, 0.95)
    assert all(g["initial_lr"] == g["lr"] for g in optimizer.param_groups)


# Refusals


ADAMW = torch.optim.AdamW
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (ADAMW, {}, "optimizer.lr=null: must be a finite number"),
    (ADAMW, {"lr": "fast"}, "optimizer.lr=fast"),
    (ADAMW, {"lr": float("nan")}, "optimizer.lr=nan"),
    (ADAMW, {"lr": -1.0}, "optimizer.lr=-1.0: AdamW refuses it"),
    (ADAMW, {"lr": 0.1, "weight_decay": -0.5}, "optimizer.weight_decay=-0.5: AdamW refuses it"),
    (ADAMW, {"lr": 0.1, "betas": [0.9, 1.5]}, "optimizer.betas=[0.9, 1.5]: AdamW refuses it"),
    (ADAMW, {"lr": 0.1, "betas": 0.9}, "optimizer.betas=0.9: AdamW refuses it"),
    (
        ADAMW,
        {"lr": 0.1, "beta": [0.9, 0.9]},
        "optimizer.beta: AdamW has no such option; did you mean betas?",
    ),
    (ADAMW, {"lr": 0.1, "decay_norm_and_bias": "no"}, "optimizer.decay_norm_and_bias=no"),
    (ADAMW, {"lr": 0.1, "groups": {"match": "x"}}, "optimizer.groups="),
    (ADAMW, {"lr": 0.1, "groups": ["x"]}, "optimizer.groups[0]=x"),
    (
        ADAMW,
        {"lr": 0.1, "groups": [{"match": "("}]},
        "optimizer.groups[0].match=(: is not a regular",
    ),
    (
        ADAMW,
        {"lr": 0.1, "groups": [{"match": "hiden.weight"}]},
        "the nearest name is hidden.weight",
    ),
    (
        ADAMW,
        {"lr": 0.1, "groups": [{"match": "."}, {"match": "out"}]},
        "optimizer.groups[1].match=out: an earlier",
    ),
    (
        ADAMW,
        {"lr": 0.1, "groups": [{"match": ".", "lr": 1, "lr_scale": 1}]},
        "both lr and lr_scale",
    ),
    (
        ADAMW,
        {"lr": 0.1, "groups": [{"match": ".", "lr_scale": -1}]},
        "optimizer.groups[0].lr=-0.1: AdamW",
    ),
    (
        ADAMW,
        {"lr": 0.1, "groups": [{"match": ".", "eps": -1.0}]},
        "optimizer.groups[0].eps=-1.0: AdamW",
    ),
    (ADAMW, {"lr": 0.1, "groups": [{"match": ".", "lr_scal": 1}]}, "did you mean lr_scale?"),
    (ADAMW, {"lr": 0.1, "groups": [{"match": ".", "fused": True}]}, "optimizer.groups[0].fused"),
    (torch.optim.SGD, {"lr": 0.1, "nesterov": True}, "SGD refuses it: Nesterov momentum requires"),
    (
        torch.optim.Rprop,
        {"lr": 0.1, "weight_decay": 0.1},
        "optimizer.weight_decay: Rprop has no such option",
    ),
    (torch.optim.LBFGS, {"lr": 0.1}, "LBFGS: evaluates the loss several times a step"),
    (torch.optim.SparseAdam, {"lr": 0.1}, "SparseAdam: can't take a step on a dense gradient"),
    (torch.optim.Muon, {"lr": 0.1}, "Muon: refuses this model's parameters"),
    (
        MuonWithAdamW,
        {"lr": 0.1, "momentum": -1.0},
        "optimizer.momentum=-1.0: MuonWithAdamW refuses it",
    ),
    (nn.Identity, {"lr": 0.1}, "gives a Identity, not a torch.optim.Optimizer"),
]


@pytest.mark.parametrize(("factory", "options", "expected"), REFUSED)
def test_refuses_in_one_line_that_names_the_key(factory: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(Net(), factory, options, CPU)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Rprop", "ASGD"])
def test_other_optimizers_of_torch_work(name: str) -> None:
    model = Net()
    options = {"lr": 0.001, "weight_decay": 0.0, "groups": [], "decay_norm_and_bias": False}
    optimizer = build_optimizer(model, getattr(torch.optim, name), options, CPU)
    _train(model, optimizer, range(3))
    load_named_state(optimizer, named_state(optimizer))
    _train(model, optimizer, range(3, 5))


# Muon


def test_hidden_weights_are_the_matrices_between_embedding_and_head() -> None:
    assert hidden_weights(Net()) == {"hidden.weight"}
    tied = Net()
    del tied.out, tied.frozen  # now the last Linear is the one tied to the embedding
    assert hidden_weights(tied) == {"hidden.weight"}
    with pytest.raises(ConfigError, match="use optimizer=adamw"):
        build_optimizer(nn.Linear(3, 2), MuonWithAdamW, {"lr": 0.1}, CPU)


def test_a_group_can_exclude_a_matrix_from_muon() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    options = {"lr": 0.1, "groups": [{"match": r"^0\.", "use_muon": False}]}
    optimizer = build_optimizer(model, MuonWithAdamW, options, CPU)
    muon = {n for g in optimizer.param_groups if g["use_muon"] for n in g["param_names"]}
    assert muon == {"1.weight"}


def test_a_schedule_and_torchs_state_dict_treat_muon_as_one_optimizer() -> None:
    _, options = _options(FOLDER / "muon.yaml")
    model, twin = Net(), Net()
    optimizer = build_optimizer(model, MuonWithAdamW, options, CPU)
    _train(model, optimizer, range(3))
    twin.load_state_dict(model.state_dict())
    other = build_optimizer(twin, MuonWithAdamW, options, CPU)
    # torch hands out the tensors themselves, which the two would go on to share.
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, net in ((optimizer, model), (other, twin)):
        _train(net, one, range(3, 5))
    _assert_same_bits(_weights(twin), _weights(model))
    before = _weights(model)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * 0.0
    _train(model, optimizer, range(5, 6))
    _assert_same_bits(_weights(model), before)


# What a learning rate does, in closed form


def _descend(lr: float, curvature: float, steps: int) -> Iterator[float]:
    """|x| of gradient descent on curvature · x² / 2 from x = 1."""
    model = nn.Module()
    model.register_parameter("x", nn.Parameter(torch.ones((), dtype=torch.float64)))
    optimizer = build_optimizer(model, torch.optim.SGD, {"lr": lr}, CPU)
    for _ in range(steps):
        optimizer.zero_grad()
        (curvature * model.x**2 / 2).backward()
        optimizer.step()
        yield float(model.x.detach())


@property_test
@given(st.floats(0.01, 3.0), st.floats(0.1, 10.0))
def test_on_a_quadratic_the_rate_decides_between_flat_oscillating_and_diverging(
    relative: float, curvature: float
) -> None:
    xs = list(_descend(relative / curvature, curvature, 12))
    assert xs == pytest.approx([(1 - relative) ** k for k in range(1, 13)], rel=1e-9, abs=1e-12)
    if relative > 2.01:
        assert abs(xs[-1]) > abs(xs[0]) > 1.0  # beyond 2/λ: diverges
    elif 1.01 < relative < 1.99:
        assert xs[0] < 0.0 < xs[1]  # beyond 1/λ: oscillates
    elif relative < 0.02:
        assert xs[-1] > 0.75  # far below: hardly moves
