"""Assigns each trainable parameter to exactly one group of options."""

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

FROM_STEP = "from_step"
"""Key of a group: the first step that updates its parameters."""


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    decay_norm_and_bias: bool = False,
    groups: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in groups of equal options, in the order of the model.

    Weight decay applies to matrices, convolutions and embeddings. It includes embeddings as in
    GPT-2's training and in nanoGPT: an embedding is a matrix product with a one-hot vector and
    is often tied to the head, and without decay the rows that are never looked up would keep
    their random initial values. Biases, the parameters of norms and all parameters with fewer
    than two dimensions are not decayed unless `decay_norm_and_bias` is true, because pulling a
    scale or a shift to zero biases the function without making it simpler. A tied weight
    belongs to one group, under its first name.

    Args:
        lr: learning rate of the groups without one of their own.
        groups: overrides, `{match: regex, …}`. The regex is searched in parameter names (in all
            names of a tied weight), and the first override that matches applies. `lr_scale`
            multiplies `lr`. `lr`, `weight_decay` (then for biases and norms too) and any other
            option of the optimizer replace the general value. `freeze: true` leaves the parameters
            as they are (see `freeze`). `from_step: n` leaves them as they are in the steps before
            step n (see `training.freezing`).

    Returns:
        One dict per group: `params` as [(name, parameter), …], the form from which torch takes
        `param_names`; `lr`; `weight_decay`; and the options of an override.

    Raises:
        ConfigError: an override has no valid `match`, matches no parameter or only those of an
            earlier override, or has both `lr` and `lr_scale`; or the model has no trainable
            parameters, or none that is trained from the first step.
    """
    freeze(model, groups)
    names = _names_by_parameter(model)
    if not names:
        raise ConfigError("model: has no trainable parameters, so there is nothing to optimize")
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
        if override.index not in taken and not override.freezes:
            raise ConfigError(override.why_unused(list(names.values()), model))
    if all(group.get(FROM_STEP, 1) > 1 for group in found.values()):
        first = min(group[FROM_STEP] for group in found.values())
        raise ConfigError(
            f"optimizer.groups: nothing would be trained before step {first}; let a group begin at step 1"
        )
    return list(found.values())


def groups_of(options: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The entries of `optimizer.groups`. Raises ConfigError where they are no list."""
    entries = options.get("groups") or ()
    if not isinstance(entries, list | tuple):
        raise ConfigError(f"optimizer.groups={entries}: must be a list of {{match: …, …}}")
    return entries


def freeze(model: nn.Module, groups: Sequence[Mapping[str, Any]], *, whole: bool = True) -> None:
    """Let the parameters for which `optimizer.groups` says `freeze: true` require no gradient.

    whole: whether the model has all of its parameters; those of a loss come later.
    Raises ConfigError for an entry of the wrong form, and for one with `freeze: true` that applies to no parameter.
    """
    overrides = [Override(index, entry) for index, entry in enumerate(groups)]
    if not any(override.freezes for override in overrides):
        return
    names = _names_by_parameter(model, frozen=True)
    taken = set()
    for parameter, aliases in names.items():
        hit = next((o for o in overrides if o.matches(aliases)), None)
        if hit is not None and hit.freezes:
            parameter.requires_grad_(False)
            taken.add(hit.index)
    if not whole:
        return
    for override in overrides:
        if override.freezes and override.index not in taken:
            raise ConfigError(override.why_unused(list(names.values()), model))
    if not any(parameter.requires_grad for parameter in names):
        raise ConfigError("optimizer.groups: every parameter is frozen, so there is nothing to train")


class Override:
    """One entry of `optimizer.groups`: a regex on parameter names, and the options for those that match."""

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
        first = self.entry.get(FROM_STEP, 1)
        if type(first) is not int or first < 1:
            raise ConfigError(f"{self.where}.{FROM_STEP}={shown(first)}: must be the number of a step, 1 or more")
        given = self.entry.pop("freeze", False)
        if not isinstance(given, bool):
            raise ConfigError(f"{self.where}.freeze={shown(given)}: must be true or false")
        self.freezes = given
        if given and self.entry:
            raise ConfigError(
                f"{self.where}: has freeze: true and {next(iter(self.entry))}, which says how to train; keep one of them"
            )

    def matches(self, aliases: Sequence[str]) -> bool:
        """Whether the regex is found in one of a parameter's names."""
        return any(self._regex.search(name) for name in aliases)

    def options(self, lr: float) -> dict[str, Any]:
        """The options of the entry; `lr_scale` becomes an `lr`, relative to the base rate `lr`."""
        given = dict(self.entry)
        if "lr_scale" in given:
            given["lr"] = lr * given.pop("lr_scale")
        return given

    def why_unused(self, names: Sequence[Sequence[str]], model: nn.Module) -> str:
        """The error message for an entry that applies to no parameter; `names` are those of its trained parameters."""
        where = f"{self.where}.match={self.pattern}"
        if any(self.matches(aliases) for aliases in names):
            return f"{where}: an earlier entry takes every parameter that it matches; put it before that one"
        known = [alias for aliases in names for alias in aliases]
        frozen = next(
            (name for name, p in model.named_parameters() if not p.requires_grad and self.matches([name])), None
        )
        if frozen is not None:
            return (
                f"{where}: matches only parameters that are frozen, such as {frozen}; leave them trainable in the model's "
                "__init__ and in earlier entries, or leave this entry out"
            )
        similar = difflib.get_close_matches(re.sub(r"[^\w.]+", "", self.pattern), known, 1, cutoff=0.0)
        return f"{where}: matches no trainable parameter; the nearest name is {similar[0]}"


def _names_by_parameter(model: nn.Module, *, frozen: bool = False) -> dict[nn.Parameter, list[str]]:
    """All names of each trainable parameter; frozen: of the others too."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad or frozen:
            names.setdefault(parameter, []).append(name)
    return names


def norm_and_bias(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that shift or scale: biases, those of norms, and all with fewer than two dimensions."""
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
    """A list as a tuple, nested lists included; any other value as it is. YAML has lists, torch expects tuples."""
    return tuple(as_tuple(v) for v in value) if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """A value as a user would type it in a config."""
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
