"""An average of the weights over the training, which is evaluated and exported instead of the last weights.

The average has less noise than the last weights, as with a smaller learning rate, while the
training itself keeps its pace: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992;
exponential form as in Tan and Le, "EfficientNet", arXiv:1905.11946.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from descent.errors import ConfigError


class Ema:
    """Exponential moving average of a model's trainable parameters.

    `shadow[name]` is the average of the parameter `name`, with its shape, dtype and device. A
    tied weight is held once, under its first name. Buffers are not averaged: those of batch
    norm are running averages already.

    After the update of step t (0 for the first):
        shadow ← d·shadow + (1 − d)·parameter,    d = min(decay, (1 + t) / (10 + t))

    d rises with the step, because a constant d = decay would keep the random initial weights in
    the average for about 1 / (1 − decay) steps. d depends on the step alone, so `shadow` is the
    whole state.

    Raises ConfigError for a decay outside (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float, *, warm_up: bool = True) -> None:
        if not 0.0 < decay < 1.0:
            raise ConfigError(f"ema.decay={decay}: must lie between 0 and 1, e.g. 0.999")
        self.decay = decay
        self.warm_up = warm_up
        self.shadow: dict[str, Tensor] = {n: p.detach().clone() for n, p in _averaged(model)}

    def decay_at(self, step: int) -> float:
        """The decay d that `update` uses after the update of `step` (0 for the first)."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warm_up else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the averages towards the weights of `model`; `step` is 0 after the first update."""
        current = [p.detach() for _, p in _averaged(model)]
        torch._foreach_lerp_(list(self.shadow.values()), current, 1.0 - self.decay_at(step))

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """A context in which `model` holds the averages; afterwards its weights are the former ones, bit for bit.

        The contents are exchanged in place, one parameter at a time: references to the tensors
        stay valid, and no second copy of the model is needed. Inside, `shadow` holds the
        model's weights, so nothing may be saved or updated there.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, parameter in _averaged(model):
            shadow = self.shadow[name]
            kept = parameter.detach().clone()
            parameter.copy_(shadow)
            shadow.copy_(kept)


def _averaged(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]
