"""A fully connected network whose arguments include the causes and cures of vanishing gradients."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from descent.errors import ConfigError
from descent.models import gates
from descent.models.arguments import (
    choice,
    count,
    flag,
    input_sizes,
    outputs,
    positive,
    probability,
    shown,
)
from descent.models.initialization import DEFAULT_STD, SCHEMES, initialize

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "identity": nn.Identity,
    "binary": gates.Sign,
}
NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class MLP(nn.Module):
    """[B, *input_shape] floating point to [B, num_outputs], through `depth` hidden layers.

    The first hidden layer is dropout(f(W x + b)), each further one

        h <- [h +] dropout(f(W norm(h) + b))            h + … where `residual` is true

    and the output is W norm(h) + b. The norm stands before the weights instead of before the
    activation: a sigmoid's outputs have mean 1/2, which hides the differences between samples
    from the next layer, and a norm behind the weights can't remove that mean any more, so
    gradients would vanish in spite of it. `depth: 0` is a linear model.

    activation: relu, gelu, tanh, sigmoid, silu, leaky_relu, elu, identity, or binary
      (straight-through sign, `descent.models.gates.sign`)
    init: see `descent.models.initialization.initialize`; `init_std` is for `normal` only
    norm: None, batch (Ioffe, Szegedy 2015) or layer (Ba et al. 2016)
    residual: skip connections around every hidden layer but the first (He et al. 2016)
    target_scale: None, or (mean, deviation): the output is mean + deviation * (W norm(h) + b). So values such as
      prices come from a network whose own numbers are small, which is what it can learn

    Raises ConfigError for arguments out of range, and in forward for inputs of another
    shape, for whole numbers, and for a single sample where batch norm needs two.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        depth: int = 2,
        width: int = 128,
        activation: str = "relu",
        init: str = "default",
        init_std: float | None = None,
        norm: str | None = None,
        residual: bool = False,
        dropout: float = 0.0,
        target_scale: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.input_shape = input_sizes(input_shape, "[28,28]")
        num_outputs = outputs(num_outputs)
        depth, width = count("model.depth", depth, 0), count("model.width", width)
        choice("model.activation", activation, ACTIVATIONS)
        choice("model.init", init, SCHEMES)
        if norm is not None:
            choice("model.norm", norm, NORMS)
        residual, dropout = flag("model.residual", residual), probability("model.dropout", dropout)
        if init_std is not None and init != "normal":
            raise ConfigError(f"model.init_std={shown(init_std)}: only model.init=normal reads it, not {init}")
        std = DEFAULT_STD if init_std is None else positive("model.init_std", init_std)

        features = math.prod(self.input_shape)
        self.layers = nn.ModuleList()
        for index in range(depth):
            own_norm = NORMS[norm](features) if norm is not None and index else None
            layer = _Layer(features, width, own_norm, activation, residual and index > 0, dropout)
            initialize(layer.linear, init, activation, std)
            self.layers.append(layer)
            features = width
        self.norm = NORMS[norm](features) if norm is not None and depth else None
        self.target_scale = None if target_scale is None else _mean_and_deviation(target_scale)
        self.head = nn.Linear(features, num_outputs)
        initialize(self.head, init, "identity", std)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.input_shape or not x.is_floating_point():
            raise ConfigError(
                f"model.input_shape={shown(self.input_shape)}: the network got inputs of shape "
                f"{shown(tuple(x.shape[1:]))}, {x.dtype}; it needs that shape in floating point"
            )
        x = x.flatten(1)
        if isinstance(self.norm, nn.BatchNorm1d) and self.training:
            refuse_single_sample(x, "model.norm=layer")
        for layer in self.layers:
            x = layer(x)
        if self.norm is not None:
            x = self.norm(x)
        x = self.head(x)
        if self.target_scale is None:
            return x
        mean, deviation = self.target_scale
        # Half precision has no room for the digits of a price.
        return mean + deviation * (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)


def _mean_and_deviation(given: Any) -> tuple[float, float]:
    numbers = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    if len(numbers) == 2 and all(isinstance(x, int | float) and math.isfinite(x) for x in numbers) and numbers[1] > 0:
        return float(numbers[0]), float(numbers[1])
    raise ConfigError(
        f"model.target_scale={shown(given)}: give [mean, deviation], two numbers, the second above 0; or null"
    )


class _Layer(nn.Module):
    """[B, inputs] to [B, width]: norm, linear, activation, dropout; with `residual` the input is added."""

    def __init__(
        self,
        inputs: int,
        width: int,
        norm: nn.Module | None,
        activation: str,
        residual: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.linear = nn.Linear(inputs, width)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x if self.norm is None else self.norm(x))
        y = self.activation(y)
        if self.dropout is not None:
            y = self.dropout(y)
        return x + y if self.residual else y


def refuse_single_sample(x: Tensor, remedy: str) -> None:
    """Raise ConfigError if batch norm would be trained on one value per channel.

    The variance of a single value is zero. torch refuses it too, but without naming a setting.
    """
    # While torch.compile traces, the batch size is a symbol; comparing it with 1 would fix it.
    if not torch.compiler.is_compiling() and x.shape[0] == 1:
        raise ConfigError(
            f"model.norm=batch: can't train on a single sample, its variance is zero; "
            f"use {remedy}, or a batch (and batch.micro_size) of at least 2 per slot"
        )
