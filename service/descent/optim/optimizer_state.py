"""Converts the state of an optimizer to a flat dict of named tensors and back.

No pickle is needed, and the result does not depend on the order of the parameter groups.
"""

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from descent.errors import CheckpointError, ConfigError

_PYTHON: dict[str, tuple[type, torch.dtype]] = {
    "bool": (bool, torch.bool),
    "int": (int, torch.int64),
    "float": (float, torch.float64),
}
_EMPTY: dict[str, Any] = {"list": [], "tuple": (), "dict": {}, "NoneType": None}
_HOST_KEYS = ("step", "mu_product")
"""Keys under which torch's optimizers keep one number per parameter, in host memory."""
_AS_BUILT = "as_built"
"""Key of a group under which `remember_options` keeps the options."""
_NO_STATE = ("params", "param_names", "lr", "initial_lr", _AS_BUILT)
"""Keys of a group that are pure functions of the config and the step."""
_OF_GROUP = "group."
"""What the key of a group's number begins with."""
_PART = re.compile(r"\[(\d+)\]|\((\d+)\)|\{([^{}]*)\}")
"""One place in a list, a tuple or a dict."""


def remember_options(optimizer: torch.optim.Optimizer) -> None:
    """Keep each group's options as they are now: what differs from them later is a part of the state.

    torch's optimizers leave their options alone; others keep counters and sums among them.
    """
    for group in optimizer.param_groups:
        group[_AS_BUILT] = {key: deepcopy(value) for key, value in group.items() if key not in _NO_STATE}


def named_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The whole state as {"<parameter name>/<key>": tensor}, in the order of the groups.

    The tensors are the optimizer's own, not copies. A Python number becomes a 0-d tensor under
    "<parameter name>/<key>:int" (or :float, :bool); the suffix is needed because an optimizer
    does not treat a 0-d tensor and a number alike. What lies in a list, a tuple or a dict has its
    place behind the key: "<key>[0]", "<key>(0)", "<key>{name}". An option of a group (lr, betas, …) is
    left out, because it comes from the config, unless the optimizer has changed it since
    `remember_options`: it is then "<alphabetically first parameter of the group>/group.<key>:int".

    Raises ConfigError for an optimizer whose state holds anything else, such as a set.
    """
    found: dict[str, Tensor] = {}
    for name, parameter, _ in _named_parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                found.update(_flat(f"{name}/{key}", value, optimizer, key))
    for group in optimizer.param_groups:
        before = group.get(_AS_BUILT, {})
        for key, value in group.items():
            if before and key not in _NO_STATE and not _same(value, before.get(key)):
                found.update(_flat(f"{min(group['param_names'])}/{_OF_GROUP}{key}", value, optimizer, key))
    return found


def check_saveable(trial: torch.optim.Optimizer) -> None:
    """Raise ConfigError where an optimizer that has taken a step, built by hand on one parameter, keeps what can't be saved."""
    for group in trial.param_groups:
        group.setdefault("param_names", ["parameter"])
    named_state(trial)


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
    options: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for (name, key), leaves in _by_key(tensors, known).items():
        parameter, group = known[name]
        placed = {path: _leaf(kind, key, value, parameter, group) for path, (kind, value) in leaves.items()}
        if key.startswith(_OF_GROUP):
            options.append((group, {key.removeprefix(_OF_GROUP): _nested(placed)}))
        else:
            states.setdefault(parameter, {})[key] = _nested(placed)
    optimizer.state.clear()
    optimizer.state.update(states)
    for group in optimizer.param_groups:
        if _AS_BUILT in group:
            for key in [key for key in group if key not in (*_NO_STATE, *group[_AS_BUILT])]:
                del group[key]
            group.update(deepcopy(group[_AS_BUILT]))
    for group, changed in options:
        group.update(changed)


Leaves = dict[tuple[tuple[str, str], ...], tuple[str, Tensor]]
"""Path within a nested value -> (kind, tensor); a path is empty for a value that is not nested."""


def _by_key(tensors: Mapping[str, Tensor], known: Mapping[str, Any]) -> dict[tuple[str, str], Leaves]:
    """(parameter name, key) -> the parts of the value. Raises CheckpointError."""
    found: dict[tuple[str, str], Leaves] = {}
    for full, value in tensors.items():
        name, slash, rest = full.rpartition("/")
        if not slash or name not in known:
            raise CheckpointError(f"the optimizer's state {full!r} belongs to no parameter of this model")
        rest, _, kind = rest.partition(":")
        if kind and kind not in _PYTHON and kind not in _EMPTY:
            raise CheckpointError(f"the optimizer's state {full!r} is of an unknown type {kind!r}")
        first = _PART.search(rest)
        key, places = (rest, "") if first is None else (rest[: first.start()], rest[first.start() :])
        path = tuple((match[0][0], match[1] or match[2] or match[3]) for match in _PART.finditer(places))
        found.setdefault((name, key), {})[path] = (kind, value)
    return found


def _leaf(kind: str, key: str, value: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> Any:
    if kind in _EMPTY:
        return deepcopy(_EMPTY[kind])
    return _PYTHON[kind][0](value.item()) if kind else _placed(key, value, parameter, group)


def _nested(leaves: Mapping[tuple[tuple[str, str], ...], Any]) -> Any:
    """The value whose parts these are."""
    if () in leaves:
        return leaves[()]
    parts: dict[str, dict[tuple[tuple[str, str], ...], Any]] = {}
    for path, value in leaves.items():
        parts.setdefault(path[0][1], {})[path[1:]] = value
    form = next(iter(leaves))[0][0]
    if form == "{":
        return {name: _nested(part) for name, part in parts.items()}
    ordered = [_nested(parts[index]) for index in sorted(parts, key=int)]
    return ordered if form == "[" else tuple(ordered)


def _flat(name: str, value: Any, optimizer: object, key: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each part of a value. Raises ConfigError for a value that has others."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        yield name, value
    elif kind in _PYTHON:
        yield f"{name}:{kind}", torch.tensor(value, dtype=_PYTHON[kind][1])
    elif value is None or (type(value) in (list, tuple, dict) and not value):
        yield f"{name}:{kind}", torch.zeros(0)
    elif type(value) in (list, tuple):
        around = "[]" if type(value) is list else "()"
        for index, item in enumerate(value):
            yield from _flat(f"{name}{around[0]}{index}{around[1]}", item, optimizer, key)
    elif type(value) is dict and all(type(k) is str and not re.search(r"[{}/:]", k) for k in value):
        for k, item in value.items():
            yield from _flat(f"{name}{{{k}}}", item, optimizer, key)
    else:
        raise ConfigError(
            f"optimizer._target_={type(optimizer).__name__}: keeps a {kind} as its state {key!r}, which can't be saved "
            "as tensors; use another optimizer"
        )


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        alike = isinstance(value, Tensor) and isinstance(other, Tensor) and value.dtype == other.dtype
        return alike and value.shape == other.shape and torch.equal(value, other)
    if isinstance(value, list | tuple) and type(value) is type(other):
        return len(value) == len(other) and all(map(_same, value, other))
    return type(value) is type(other) and bool(value == other)


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
