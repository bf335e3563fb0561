"""Converts the state of an optimizer to a flat dict of named tensors and back.

No pickle is needed, and the result does not depend on the order of the parameter groups.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from descent.errors import CheckpointError, ConfigError

_PYTHON: dict[str, tuple[type, torch.dtype]] = {
    "bool": (bool, torch.bool),
    "int": (int, torch.int64),
    "float": (float, torch.float64),
}
_HOST_KEYS = ("step", "mu_product")
"""Keys under which torch's optimizers keep one number per parameter, in host memory."""


def named_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The whole state as {"<parameter name>/<key>": tensor}, in the order of the groups.

    The tensors are the optimizer's own, not copies. A Python number becomes a 0-d tensor under
    "<parameter name>/<key>:int" (or :float, :bool); the suffix is needed because an optimizer
    does not treat a 0-d tensor and a number alike. Options (lr, betas, …) are left out, because
    they come from the config.

    Raises ConfigError for an optimizer whose state holds anything else, such as a list.
    """
    found: dict[str, Tensor] = {}
    for name, parameter, _ in _named_parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{name}/{key}"] = value
            elif type(value).__name__ in _PYTHON:
                kind = type(value).__name__
                found[f"{name}/{key}:{kind}"] = torch.tensor(value, dtype=_PYTHON[kind][1])
            elif value is not None:
                raise ConfigError(
                    f"optimizer._target_={type(optimizer).__name__}: keeps a {type(value).__name__} "
                    f"as its state {key!r}, which can't be saved as tensors; use another optimizer"
                )
    return found


def load_named_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Replace the whole state by copies of `tensors`, which `named_state` returned.

    The optimizer may be a new one that has never made a step. A tensor is copied to the device
    of its parameter, and to the parameter's memory layout if the shapes are equal (fused kernels
    require that). Numbers per parameter (step) stay in host memory unless the group is fused or
    capturable, as in torch.

    Raises CheckpointError for a parameter that the optimizer doesn't have and for an unknown type.
    """
    known = {name: (parameter, group) for name, parameter, group in _named_parameters(optimizer)}
    states: dict[Tensor, dict[str, Any]] = {}
    for full, value in tensors.items():
        name, slash, key = full.rpartition("/")
        if not slash or name not in known:
            raise CheckpointError(f"the optimizer's state {full!r} belongs to no parameter of this model")
        parameter, group = known[name]
        key, _, kind = key.partition(":")
        if kind and kind not in _PYTHON:
            raise CheckpointError(f"the optimizer's state {full!r} is of an unknown type {kind!r}")
        placed = _PYTHON[kind][0](value.item()) if kind else _placed(key, value, parameter, group)
        states.setdefault(parameter, {})[key] = placed
    optimizer.state.clear()
    optimizer.state.update(states)


def _placed(key: str, value: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    number = value.ndim == 0 and (parameter.ndim > 0 or key in _HOST_KEYS)
    if number and not (group.get("fused") or group.get("capturable")):
        return value.detach().to("cpu", copy=True)
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value.detach())
    return value.detach().to(parameter.device, copy=True)


def _named_parameters(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    for group in optimizer.param_groups:
        assert "param_names" in group, "the optimizer was not built by build_optimizer"
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            yield name, parameter, group
