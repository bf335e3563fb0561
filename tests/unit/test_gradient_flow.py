"""Gradients: the chain rule against finite differences, how they vanish and what cures it, the gates."""

from collections.abc import Iterator

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from descent.config.build import build
from descent.models import gates
from descent.models.gpt import GPT
from descent.models.mlp import MLP
from descent.models.resnet import ResNet


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small run faster on one thread, above all beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    return torch.tensor(bunch.images[:256] / 16, dtype=torch.float32), torch.tensor(bunch.target[:256])


# --- the chain rule ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (MLP((4,), 2, 3, 5, "tanh"), (3, 4)),
        (MLP((4,), 2, 3, 5, "gelu", norm="layer", residual=True), (3, 4)),
        (MLP((4,), 2, 2, 5, "sigmoid", norm="batch"), (3, 4)),
        (MLP((4,), 2, 2, 5, "silu", "orthogonal", norm="batch", residual=True), (3, 4)),
        # relu has a kink; none of these few inputs lies within 1e-6 of one
        (ResNet((4, 4), 2, 1, (2, 2), "group", 1, zero_init_residual=False), (2, 4, 4)),
        (ResNet((4, 4), 2, 1, (2, 2), zero_init_residual=False), (2, 4, 4)),
    ],
)
def test_gradients_are_those_of_finite_differences(model, shape):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    model = model.double()
    names = [name for name, _ in model.named_parameters()]
    inputs = torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(loss, (inputs, *model.parameters()), fast_mode=True)


def test_gpt_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    model = GPT((4,), 5, layers=1, heads=2, width=4).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    names = [name for name, _ in model.named_parameters()]
    ids = torch.randint(5, (2, 4))

    def logits(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (ids,))

    assert torch.autograd.gradcheck(logits, tuple(model.parameters()))


# --- vanishing gradients and their cures ---------------------------------------------------


def flow(model: MLP, inputs: Tensor, targets: Tensor) -> float:
    """The gradient norm of the first hidden layer, divided by that of the last."""
    model.zero_grad()
    F.cross_entropy(model(inputs), targets).backward()
    norms = [layer.linear.weight.grad.norm().item() for layer in model.layers]
    return norms[0] / norms[-1]


def deep(seed: int, **choices: object) -> MLP:
    torch.manual_seed(seed)
    return MLP((8, 8), 10, **{"depth": 20, "width": 64, "activation": "sigmoid", **choices})


SICK = {
    "sigmoid": {},
    "sigmoid, xavier": {"init": "xavier_normal"},
    "relu, torch's default": {"activation": "relu"},
}
CURED = {
    "relu and kaiming": {"activation": "relu", "init": "kaiming_normal"},
    "tanh and xavier": {"activation": "tanh", "init": "xavier_uniform"},
    "sigmoid and layer norm": {"norm": "layer"},
    "sigmoid and batch norm": {"norm": "batch"},
    "sigmoid and residual": {"residual": True},
    "sigmoid, residual and layer norm": {"residual": True, "norm": "layer"},
}


@pytest.mark.parametrize("choices", SICK.values(), ids=SICK)
def test_gradients_vanish_in_a_deep_stack(choices):
    inputs, targets = digits()
    assert all(0 < flow(deep(seed, **choices), inputs, targets) < 1e-4 for seed in range(3))


@pytest.mark.parametrize("choices", CURED.values(), ids=CURED)
def test_each_cure_restores_the_gradient_of_the_first_layer(choices):
    inputs, targets = digits()
    for seed in range(3):
        assert 1e-2 < flow(deep(seed, **choices), inputs, targets) < 1e2


def test_gradients_vanish_in_the_demonstration_and_each_listed_cure_works(pytestconfig):
    text = (pytestconfig.rootpath / "configs" / "model" / "mlp_vanishing.yaml").read_text()
    spec = yaml.safe_load(text) | {"input_shape": [8, 8], "num_outputs": 10}
    listed = [line for line in text.splitlines() if line.startswith("#   model.")]
    assert len(listed) == 4
    inputs, targets = digits()

    def flow_with(overrides: dict[str, object]) -> float:
        torch.manual_seed(0)
        return flow(build(spec | overrides, [], "model"), inputs, targets)

    assert flow_with({}) < 1e-4
    for line in listed:
        pairs = (pair.removeprefix("model.").split("=") for pair in line[1:].split())
        assert 1e-2 < flow_with({key: yaml.safe_load(value) for key, value in pairs}) < 1e2, line


def test_weights_that_are_too_small_make_all_gradients_vanish_and_xavier_restores_them():
    inputs, targets = digits()
    norms = []
    for choices in ({"init": "normal", "init_std": 0.05}, {"init": "xavier_uniform"}):
        model = deep(0, activation="tanh", **choices)
        F.cross_entropy(model(inputs), targets).backward()
        norms.append([layer.linear.weight.grad.norm().item() for layer in model.layers])
    # The signal fades on its way up as the gradient does on its way down, so the ratio of
    # first to last hides it: here all are tiny alike.
    assert max(norms[0]) < 1e-5
    assert min(norms[1]) > 1e-2


def loss_after(model: nn.Module, num_steps: int, learning_rate: float) -> float:
    inputs, targets = digits()
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    for _ in range(num_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(inputs), targets).item()


def test_networks_learn_with_a_cure_and_not_without():
    guessing = 2.303  # log(10)
    assert loss_after(deep(0, init="xavier_normal"), 40, 1e-3) > 0.98 * guessing
    for name in ("relu and kaiming", "tanh and xavier", "sigmoid and layer norm"):
        assert loss_after(deep(0, **CURED[name]), 40, 1e-3) < 0.5 * guessing, name
    # Sums of sigmoids drift upwards, so this cure alone learns, but slowly.
    assert loss_after(deep(0, residual=True), 120, 1e-3) < 0.9 * guessing


# --- gates ------------------------------------------------------------------------------------

finite = st.floats(-1e6, 1e6, width=32)


@settings(deadline=None)
@given(st.lists(finite, min_size=1, max_size=20))
def test_gates_have_exact_values_and_their_stated_gradients(values):
    x = torch.tensor(values, requires_grad=True)
    upstream = torch.arange(1.0, len(values) + 1)
    y = gates.sign(x)
    assert torch.equal(y, torch.where(x >= 0, 1.0, -1.0))
    (slope,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(slope, torch.where(x.abs() < 1, upstream, 0.0))
    y = gates.round(x)
    assert torch.equal(y, torch.round(x))
    (slope,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(slope, upstream)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dim", [-1, 0])
def test_gumbel_softmax_is_torchs_own(hard, dim):
    logits = torch.randn(50, 7, requires_grad=True)
    upstream = torch.randn(50, 7)
    torch.manual_seed(2)
    expected = F.gumbel_softmax(logits, 0.7, hard, dim=dim)
    torch.manual_seed(2)
    given_ = gates.gumbel_softmax(logits, 0.7, hard=hard, dim=dim)
    torch.testing.assert_close(given_, expected)
    torch.testing.assert_close(
        torch.autograd.grad(given_, logits, upstream)[0],
        torch.autograd.grad(expected, logits, upstream)[0],
    )


def test_gumbel_draws_follow_the_softmax():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    n = 100_000
    draws = gates.gumbel_softmax(logits.expand(n, 4), 0.3, hard=True)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(draws.sum(-1), torch.ones(n))
    p = logits.softmax(0)
    # Five standard errors of a share, with a fixed seed.
    assert ((draws.mean(0) - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_gumbel_softmax_approaches_one_hot_as_the_temperature_falls():
    torch.manual_seed(0)
    logits = torch.randn(200, 5)
    peaks = []
    for temperature in (10.0, 1.0, 0.01):
        torch.manual_seed(1)
        soft = gates.gumbel_softmax(logits, temperature)
        torch.testing.assert_close(soft.sum(-1), torch.ones(200))
        peaks.append(soft.max(-1).values.mean().item())
    assert peaks[0] < 0.3 < peaks[1] < 0.9 < peaks[2]


@pytest.mark.parametrize("hard", [False, True])
def test_the_gumbel_layer_is_deterministic_in_evaluation(hard):
    layer = gates.GumbelSoftmax(0.5, hard=hard).eval()
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, -1.0]])
    one_hot = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    expected = one_hot if hard else (logits / 0.5).softmax(-1)
    torch.testing.assert_close(layer(logits), expected)
    assert torch.equal(layer(logits), layer(logits))


def test_half_precision_gumbel_draws_its_noise_in_full():
    torch.manual_seed(0)
    logits = torch.zeros(1000, 3)
    torch.manual_seed(1)
    full = gates.gumbel_softmax(logits)
    torch.manual_seed(1)
    half = gates.gumbel_softmax(logits.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, full.bfloat16())


def test_a_network_of_binary_units_learns():
    inputs, targets = digits()
    torch.manual_seed(0)
    model = MLP((8, 8), 10, depth=2, width=64, activation="binary")
    loss_after(model, 60, 1e-2)
    hidden = model.layers[0](inputs.flatten(1))
    assert set(hidden.unique().tolist()) == {-1.0, 1.0}
    assert (model(inputs).argmax(-1) == targets).float().mean().item() > 0.9
