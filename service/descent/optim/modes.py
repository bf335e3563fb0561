"""Optimizers that know two modes, as schedule-free ones do: one of training, one of evaluation.

Such an optimizer trains at one point and evaluates at another, which it computes from the weights and its state.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer, or one of those of its phases, has methods `train()` and `eval()`."""
    parts = getattr(optimizer, "optimizers", None) or {"": optimizer}
    return any(callable(getattr(part, mode, None)) for part in parts.values() for mode in ("train", "eval"))


def to_training(optimizer: Any) -> None:
    """Put the optimizer into the mode of training, where it has one."""
    if callable(train := getattr(optimizer, "train", None)):
        train()


@contextmanager
def as_evaluated(optimizer: Any) -> Iterator[None]:
    """Within the block the parameters are what the optimizer's author evaluates and exports: those after `eval()`.

    Afterwards the weights are the former ones, bit for bit: the way from `train()` to `eval()` and back rounds.
    """
    if not has_modes(optimizer):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        kept = [p.detach().clone() for p in parameters]
        optimizer.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            optimizer.train()
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
