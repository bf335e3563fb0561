"""The built-in networks: shapes, sizes, initial weights, causality, export and refusals."""

import math
from collections.abc import Iterator

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, export
from torch.nn import functional as F

from descent.config.build import build
from descent.errors import ConfigError
from descent.models import gates
from descent.models.gpt import GPT
from descent.models.initialization import SCHEMES, gain, initialize
from descent.models.mlp import ACTIVATIONS, MLP, NORMS
from descent.models.resnet import ResNet

quick = settings(max_examples=15, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small run faster on one thread, above all beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- shapes and sizes ---------------------------------------------------------------


@quick
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    outputs=st.integers(1, 5),
    depth=st.integers(0, 4),
    width=st.integers(1, 9),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    init=st.sampled_from(SCHEMES),
    norm=st.sampled_from([None, *NORMS]),
    residual=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
)
def test_mlp_has_the_stated_shape_and_size_and_uses_every_parameter(
    shape, outputs, depth, width, activation, init, norm, residual, dropout
):
    model = MLP(shape, outputs, depth, width, activation, init, None, norm, residual, dropout)
    output = model(torch.randn(3, *shape))
    assert output.shape == (3, outputs)
    features = math.prod(shape)
    expected = features * outputs + outputs
    if depth:
        expected = features * width + width + (depth - 1) * (width * width + width)
        expected += width * outputs + outputs
        expected += 2 * width * depth if norm else 0
    assert num_parameters(model) == expected
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@quick
@given(
    channels=st.sampled_from([None, 1, 3]),
    side=st.integers(8, 20),
    blocks=st.sampled_from([1, 2, [1, 2]]),
    norm=st.sampled_from(["batch", "group"]),
    zero=st.booleans(),
)
def test_resnet_takes_small_images(channels, side, blocks, norm, zero):
    shape = (side, side + 1) if channels is None else (channels, side, side + 1)
    model = ResNet(shape, 7, blocks, (4, 8), norm, groups=4, zero_init_residual=zero)
    output = model(torch.randn(2, *shape))
    assert output.shape == (2, 7)
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_resnet20_has_the_size_of_the_paper():
    # He et al. 2015, table 6: 0.27 million, counted here by hand from its section 4.2
    # (plus the two 1x1 projections with their norms, which its parameter-free skips lack).
    model = ResNet((3, 32, 32), 10, blocks=3, widths=(16, 32, 64))
    stage = [6 * 9 * 16 * 16, 9 * 16 * 32 + 5 * 9 * 32 * 32, 9 * 32 * 64 + 5 * 9 * 64 * 64]
    norms = 2 * (16 + 6 * 16 + 6 * 32 + 6 * 64)
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    expected = 9 * 3 * 16 + sum(stage) + norms + projections + 64 * 10 + 10
    assert num_parameters(model) == expected
    assert 0.265e6 < expected < 0.28e6


def test_resnet_starts_as_its_skips_where_the_last_scale_is_zero():
    torch.manual_seed(0)
    block = ResNet((4, 8, 8), 2, blocks=1, widths=(4,)).stages[0][0]
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), F.relu(x))


@quick
@given(
    context=st.integers(1, 12),
    vocabulary=st.integers(2, 20),
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    per_head=st.integers(1, 4),
    tied=st.booleans(),
    bias=st.booleans(),
    data=st.data(),
)
def test_gpt_has_its_shape_and_its_size(context, vocabulary, layers, heads, per_head, tied, bias, data):
    width = heads * per_head
    model = GPT((context,), vocabulary, layers, heads, width, tied=tied, bias=bias)
    length = data.draw(st.integers(1, context))
    output = model(torch.randint(vocabulary, (2, length)))
    assert output.shape == (2, length, vocabulary)
    weights, biases = 12 * width * width + 2 * width, 11 * width
    expected = (vocabulary * (1 if tied else 2) + context) * width + width
    expected += layers * weights + ((layers * biases + width) if bias else 0)
    assert num_parameters(model) == expected
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("option", "shape", "outputs", "size"),
    [
        ("gpt_124m", None, 50257, 124_439_808),  # the published figure for GPT-2
        ("gpt_small", [256], 256, 10_818_432),
        ("gpt_tiny", [128], 256, 836_736),
        ("gpt", [128], 256, 836_736),
        ("mlp", [8, 8], 10, 64 * 128 + 128 + 128 * 128 + 128 + 1290),
        ("mlp_vanishing", [8, 8], 10, 20 * (64 * 64 + 64) + 650),
        ("resnet", [8, 8], 10, None),
    ],
)
def test_every_config_builds_at_its_stated_size(option, shape, outputs, size, pytestconfig):
    text = (pytestconfig.rootpath / "configs" / "model" / f"{option}.yaml").read_text()
    assert text.startswith("# ")
    spec = yaml.safe_load(text)
    assert spec["num_outputs"] is None
    spec["num_outputs"] = outputs
    spec["input_shape"] = spec["input_shape"] or shape
    with torch.device("meta"):
        model = build(spec, [], "model")
    assert size is None or num_parameters(model) == size


# --- initial weights ------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "leaky_relu", "identity"])
@pytest.mark.parametrize("scheme", ["kaiming_uniform", "kaiming_normal"])
def test_kaiming_is_torchs_own(activation, scheme):
    linear, reference = nn.Linear(30, 20), torch.empty(20, 30)
    torch.manual_seed(1)
    initialize(linear, scheme, activation)
    torch.manual_seed(1)
    nonlinearity = {"identity": "linear"}.get(activation, activation)
    slope = 0.01 if activation == "leaky_relu" else 0.0
    getattr(nn.init, f"{scheme}_")(reference, a=slope, nonlinearity=nonlinearity)
    torch.testing.assert_close(linear.weight.detach(), reference)
    assert not linear.bias.any()


@pytest.mark.parametrize("kind", ["uniform", "normal"])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_variances_follow_glorot_and_he(activation, kind):
    torch.manual_seed(0)
    linear, inputs, outputs = nn.Linear(400, 200), 400, 200
    g = gain(activation)
    for scheme, variance in [
        (f"xavier_{kind}", 2 * g * g / (inputs + outputs)),
        (f"kaiming_{kind}", g * g / inputs),
    ]:
        initialize(linear, scheme, activation)
        assert linear.weight.var().item() == pytest.approx(variance, rel=0.03)
        if kind == "uniform":
            assert linear.weight.abs().max().item() <= math.sqrt(3 * variance) * 1.0001


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "elu"])
def test_gain_keeps_the_second_moment_of_a_rectifier(activation):
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    second_moment = torch.trapezoid(ACTIVATIONS[activation]()(z) ** 2 * density, z)
    assert gain(activation) ** 2 * second_moment.item() == pytest.approx(1.0, abs=1e-6)


def test_orthogonal_and_normal_have_their_stated_properties():
    linear = nn.Linear(64, 64)
    initialize(linear, "orthogonal", "relu")
    product = linear.weight @ linear.weight.T
    torch.testing.assert_close(product, 2 * torch.eye(64), atol=1e-4, rtol=0)
    torch.manual_seed(0)
    model = MLP((300,), 2, depth=1, width=300, init="normal", init_std=0.5)
    assert model.layers[0].linear.weight.std().item() == pytest.approx(0.5, rel=0.02)


def test_gpt_starts_with_smaller_weights_into_the_residual_stream():
    torch.manual_seed(0)
    model = GPT((8,), 50, layers=8, heads=4, width=128)
    block = model.blocks[3]
    assert block.up.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for projection in (block.down, block.attention.out):
        assert projection.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    # So the first loss is that of guessing: the logarithm of the vocabulary.
    ids = torch.randint(50, (4, 8))
    loss = F.cross_entropy(model(ids).flatten(0, 1), ids.roll(1).flatten())
    assert loss.item() == pytest.approx(math.log(50), rel=0.05)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLP((8,), 3, init="orthogonal"),
        lambda: ResNet((8, 8), 3, 1),
        lambda: GPT((8,), 9),
    ],
)
def test_a_seed_fixes_the_initial_weights(make):
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(torch.cat([p.detach().flatten() for p in make().parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


# --- behaviour ----------------------------------------------------------------------------


@quick
@given(position=st.integers(1, 11), seed=st.integers(0, 1000))
def test_gpt_positions_depend_on_earlier_tokens_only(position, seed):
    torch.manual_seed(seed)
    model = GPT((12,), 30, layers=2, heads=2, width=16).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)  # far from its tame start, so that a leak shows
    ids = torch.randint(30, (2, 12))
    changed = ids.clone()
    changed[:, position:] = (ids[:, position:] + 1) % 30
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :position], after[:, :position])
    assert not torch.allclose(before[:, position:], after[:, position:])
    # and a shorter input is a prefix
    torch.testing.assert_close(model(ids[:, :position]), before[:, :position])


def test_gpt_attention_is_the_formula():
    torch.manual_seed(0)
    attention = GPT((6,), 9, layers=1, heads=2, width=8).blocks[0].attention.double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(8, dim=-1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4)
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    expected = torch.cat(heads, -1) @ attention.out.weight.T + attention.out.bias
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_residual_mlp_is_the_formula(norm):
    torch.manual_seed(0)
    model = MLP((5,), 3, depth=2, width=4, activation="tanh", norm=norm, residual=True)
    x = torch.randn(6, 5)

    def normalized(h: Tensor) -> Tensor:
        dim = 0 if norm == "batch" else 1
        return (h - h.mean(dim, True)) / (h.var(dim, correction=0, keepdim=True) + 1e-5).sqrt()

    first, second = (layer.linear for layer in model.layers)
    h = torch.tanh(x @ first.weight.T + first.bias)
    h = h + torch.tanh(normalized(h) @ second.weight.T + second.bias)
    expected = normalized(h) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected)


MODELS = {
    "mlp": lambda: (MLP((4, 4), 3, 3, 8, residual=True), torch.randn(4, 4, 4)),
    "mlp_batch": lambda: (MLP((8,), 3, 2, 8, norm="batch", dropout=0.2), torch.randn(4, 8)),
    "mlp_layer": lambda: (MLP((8,), 3, 2, 8, norm="layer"), torch.randn(4, 8)),
    "mlp_binary": lambda: (MLP((8,), 3, 2, 8, "binary"), torch.randn(4, 8)),
    "resnet": lambda: (ResNet((8, 8), 3, 1, (4, 8)), torch.randn(4, 8, 8)),
    "resnet_group": lambda: (
        ResNet((3, 4, 4), 3, 1, (4, 8, 8), "group", 4),
        torch.randn(4, 3, 4, 4),
    ),
    "gpt": lambda: (GPT((6,), 9, 1, 2, 8, dropout=0.1), torch.randint(9, (4, 6))),
    "gpt_untied": lambda: (GPT((6,), 9, 1, 2, 8, tied=False, bias=False), torch.randint(9, (4, 6))),
    "gumbel": lambda: (
        nn.Sequential(nn.Linear(4, 3), gates.GumbelSoftmax(0.5, hard=True)),
        torch.randn(4, 4),
    ),
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_export_gives_the_same_bits_for_any_batch(name, training):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.train(training)
    program = export(model, (x,), dynamic_shapes=({0: Dim("batch")},)).module()
    for size in (2, 4, 7) if training else (1, 4, 7):
        batch = x[torch.arange(size) % len(x)]
        torch.manual_seed(3)
        expected = model(batch)
        torch.manual_seed(3)
        assert torch.equal(program(batch), expected)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_autocast_is_close_to_fp32_and_trains(name):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    if name in ("gumbel", "mlp_binary"):
        model.train()  # a rounding may turn a hard choice: only that it runs and is finite
    else:
        model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    if not model.training:
        torch.testing.assert_close(output.float(), model(x), atol=0.05, rtol=0.1)
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_compiles_without_a_graph_break(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = MODELS[name]()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert torch.equal(compiled(x), expected)


# --- what must be refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: MLP((4,), 2, activation="rellu"), ["model.activation=rellu", "relu"]),
        (lambda: MLP((4,), 2, depth=-1), ["model.depth=-1", "0 or more"]),
        (lambda: MLP((4,), 2, depth=2.5), ["model.depth=2.5", "whole number"]),
        (lambda: MLP((4,), 2, depth=True), ["model.depth=true", "whole number"]),
        (lambda: MLP((4,), 2, width=0), ["model.width=0", "1 or more"]),
        (lambda: MLP((4,), 2, init="xavier"), ["model.init=xavier", "xavier_normal"]),
        (lambda: MLP((4,), 2, init_std=0.1), ["model.init_std=0.1", "model.init=normal"]),
        (lambda: MLP((4,), 2, init="normal", init_std=0), ["model.init_std=0", "above 0"]),
        (lambda: MLP((4,), 2, norm="bach"), ["model.norm=bach", "batch"]),
        (lambda: MLP((4,), 2, residual="no"), ["model.residual=no", "true or false"]),
        (lambda: MLP((4,), 2, dropout=1.0), ["model.dropout=1.0"]),
        (lambda: MLP(None, 2), ["model.input_shape=null", "data set"]),
        (lambda: MLP((4,), None), ["model.num_outputs=null", "data set"]),
        (lambda: MLP((4, 0), 2), ["model.input_shape=[4,0]"]),
        (lambda: ResNet((4,), 2), ["model.input_shape=[4]", "model=mlp"]),
        (lambda: ResNet((8, 8), 2, blocks=[1, 1]), ["model.blocks=[1,1]", "has 3"]),
        (lambda: ResNet((8, 8), 2, norm="layer"), ["model.norm=layer", "batch, group"]),
        (lambda: ResNet((8, 8), 2, norm="group", groups=7), ["model.groups=7", "8 would"]),
        (lambda: GPT((8, 8), 2), ["model.input_shape=[8,8]", "token ids"]),
        (lambda: GPT((8,), 2, heads=5, width=24), ["model.heads=5", "model.width=24", "4 would"]),
        (lambda: GPT((8,), 2, layers=0), ["model.layers=0"]),
        (lambda: GPT((8,), 2, tied=1), ["model.tied=1", "true or false"]),
        (lambda: gates.GumbelSoftmax(0.0), ["model.temperature=0.0", "above 0"]),
        (lambda: MLP((4,), 2)(torch.randn(3, 5)), ["model.input_shape=[4]", "[5]"]),
        (lambda: MLP((4,), 2)(torch.ones(3, 4, dtype=torch.uint8)), ["uint8", "floating point"]),
        (lambda: ResNet((8, 8), 2)(torch.randn(3, 1, 8, 8)), ["model.input_shape=[8,8]"]),
        (lambda: GPT((4,), 9)(torch.zeros(1, 5, dtype=torch.int64)), ["[5]", "at most 4"]),
        (lambda: GPT((4,), 9)(torch.randn(1, 4)), ["float32", "int64"]),
        (lambda: MLP((4,), 2, norm="batch")(torch.randn(1, 4)), ["model.norm=batch", "norm=layer"]),
        (lambda: ResNet((4, 4), 2, 1)(torch.randn(1, 4, 4)), ["model.norm=batch", "norm=group"]),
    ],
)
def test_refuses_in_one_line_with_key_value_and_remedy(make, parts):
    with pytest.raises(ConfigError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_single_sample_is_accepted_where_batch_norm_is_not_trained_on_it():
    assert MLP((4,), 2, norm="batch").eval()(torch.randn(1, 4)).isfinite().all()
    assert MLP((4,), 2, norm="layer")(torch.randn(1, 4)).isfinite().all()
    assert ResNet((8, 8), 2, 1)(torch.randn(1, 8, 8)).isfinite().all()  # 2x2 values per channel
    assert ResNet((4, 4), 2, 1, norm="group")(torch.randn(1, 4, 4)).isfinite().all()
