"""Which parameter is trained with which options: every one in exactly one group."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from descent.errors import ConfigError

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    decay_norm_and_bias: bool = False,
    groups: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group of equal options, in the model's order.

    Decayed are the weights that multiply: matrices, convolutions, and embeddings too, as in
    GPT-2's own training and nanoGPT (an embedding is a matrix product with a one-hot vector,
    and often tied to the head; rows that are never looked up would otherwise keep their
    random start). Not decayed, unless `decay_norm_and_bias`: biases, the parameters of
    norms, and whatever has fewer than two dimensions, because pulling a scale or a shift
    to zero only biases the function. A tied weight counts once, under its first name.

    Args:
        lr: base learning rate of groups that don't say their own.
        groups: overrides, `{match: regex, …}`, searched in parameter names (all names of a
            tied weight); the first that matches wins. `lr_scale` multiplies `lr`; `lr`,
            `weight_decay` (which then holds for biases and norms too) and any other option
            of the optimizer replace the general one.

    Returns:
        dicts of `params` [(name, parameter), …], which is how torch learns `param_names`,
        `lr`, `weight_decay`, and what an override added.

    Raises:
        ConfigError: an override without a valid `match`, one whose `match` finds nothing
            or only what an earlier one has taken, both `lr` and `lr_scale`.
    """
    names = _names_by_parameter(model)
    if not names:
        raise ConfigError("model: it has no trainable parameters, so there is nothing to optimize")
    undecayed = set() if decay_norm_and_bias else norm_and_bias(model)
    overrides = [Override(index, entry) for index, entry in enumerate(groups)]
    taken: dict[int, int] = {}
    found: dict[str, dict[str, Any]] = {}
    for parameter, aliases in names.items():
        hit = next((o for o in overrides if o.matches(aliases)), None)
        decay = 0.0 if parameter in undecayed else weight_decay
        options = {"lr": lr, "weight_decay": decay}
        if hit is not None:
            taken[hit.index] = taken.get(hit.index, 0) + 1
            options.update(hit.options(lr))
        key = repr(sorted(options.items()))
        group = found.setdefault(key, {"params": [], **options})
        group["params"].append((aliases[0], parameter))
    for override in overrides:
        if override.index not in taken:
            raise ConfigError(override.why_unused(list(names.values())))
    return list(found.values())


class Override:
    """One entry of `optimizer.groups`."""

    def __init__(self, index: int, entry: Mapping[str, Any]) -> None:
        self.index = index
        self.where = f"optimizer.groups[{index}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("match"), str):
            raise ConfigError(f"{self.where}={entry}: needs the form {{match: 'regex on parameter name', …}}")
        self.pattern: str = entry["match"]
        try:
            self._regex = re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"{self.where}.match={self.pattern}: is not a regular expression: {error}") from error
        self.entry = {k: as_tuple(v) for k, v in entry.items() if k != "match"}
        if "lr" in self.entry and "lr_scale" in self.entry:
            raise ConfigError(f"{self.where}: has both lr and lr_scale; keep one of them")
        for key in ("lr", "lr_scale", "weight_decay"):
            if key in self.entry:
                number(f"{self.where}.{key}", self.entry[key])

    def matches(self, aliases: Sequence[str]) -> bool:
        return any(self._regex.search(name) for name in aliases)

    def options(self, lr: float) -> dict[str, Any]:
        given = dict(self.entry)
        if "lr_scale" in given:
            given["lr"] = lr * given.pop("lr_scale")
        return given

    def why_unused(self, names: Sequence[Sequence[str]]) -> str:
        where = f"{self.where}.match={self.pattern}"
        if any(self.matches(aliases) for aliases in names):
            return f"{where}: an earlier entry takes every parameter that it matches; put it before that one"
        known = [alias for aliases in names for alias in aliases]
        near = difflib.get_close_matches(re.sub(r"[^\w.]+", "", self.pattern), known, 1, cutoff=0.0)
        return f"{where}: matches no trainable parameter; the nearest name is {near[0]}"


def _names_by_parameter(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    return names


def norm_and_bias(model: nn.Module) -> set[nn.Parameter]:
    """What shifts and scales instead of mixing: biases, norms, all below two dimensions."""
    found = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, _NORMS) or parameter.ndim < 2 or name == "bias":
                found.add(parameter)
    return found


def number(where: str, value: Any) -> float:
    """`value` as a float; ConfigError naming the key `where` if it isn't a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}={shown(value)}: must be a finite number")
    return float(value)


def as_tuple(value: Any) -> Any:
    """Lists, nested ones too, as tuples: YAML has only lists, torch wants tuples."""
    return tuple(as_tuple(v) for v in value) if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """A value as the config's author would type it."""
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
