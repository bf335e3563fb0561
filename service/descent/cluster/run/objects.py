"""Objects, classes and functions among the arguments of `descent.train`, and the overrides that stand for them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from descent.config import given
from descent.config.files import groups
from descent.config.overrides import shown_override
from descent.errors import ConfigError

_PLAIN = (str, bool, int, float, Path, type(None))
_SETS = {"data": "data.train", "evaluate_data": "data.evaluate"}
"""Arguments of `descent.train` whose objects lie under another key of the config."""
_GROUPS = ("model", "task", "loss", "optimizer", "schedule")


def split_objects(tree: Mapping[str, Any], config_dirs: Sequence[str] = ()) -> tuple[list[str], dict[str, Any]]:
    """(overrides, placeholder -> object) for the values of `tree` that no override can express.

    tree: key of the config, or argument of `descent.train` -> value. Plain values, lists and mappings of plain values
    are left out: they are overrides already.

    Raises ConfigError for objects that can't be what their key needs.
    """
    options = groups(config_dirs)
    overrides: list[str] = []
    objects: dict[str, Any] = {}
    for name, value in sorted(tree.items(), key=lambda item: (item[0] not in _GROUPS, item[0] != "data")):
        key = _SETS.get(name, name)
        made = _usable(key, name, value)
        target = given.placeholder(key, made)
        group = key.partition(".")[0]
        if key in _GROUPS or key == "data.train":
            if "custom" not in options.get(group, {}):
                raise ConfigError(f"{name}: takes no object yet, but one of {', '.join(options.get(group, {}))}")
            overrides.append(f"{group}=custom")
        prefix = "" if key in _GROUPS or key == "data.train" else "++"
        overrides.append(f"{prefix}{key}._target_={target}")
        objects[target] = made
    return overrides, objects


def is_object(name: str, value: Any) -> bool:
    """Whether a value is no plain value of a config, nor a list or mapping of such values.

    A list is data where data is wanted.
    """
    if name in _SETS:
        return not isinstance(value, (str, type(None))) and not (
            isinstance(value, Mapping) and not _holds_object(value)
        )
    return _holds_object(value)


def _holds_object(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_object, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_object, value))
    return not isinstance(value, _PLAIN)


def _usable(key: str, name: str, value: Any) -> Any:
    """The object in the form in which it can be trained with. Raises ConfigError for what has another place."""
    import torch

    kind = type(value).__name__
    if isinstance(value, Mapping) and key in (*_GROUPS, *_SETS.values()):
        raise ConfigError(
            f"{name}: is a {kind} with objects in it; give a list of samples or a Dataset, or single keys"
        )
    if key == "model":
        if kind in ("DistributedDataParallel", "DataParallel"):
            raise ConfigError(f"model: is wrapped in {kind}, which Descent does in its own way; give model.module")
        if kind == "OptimizedModule":
            raise ConfigError("model: is compiled already; give the model itself, and compile=True")
        if isinstance(value, torch.nn.Module) and any(p.device.type != "cpu" for p in value.parameters()):
            import copy

            return copy.deepcopy(value).cpu()  # each worker takes its copy to its own device
    if key in _SETS.values():
        return _data_set(name, value)
    return value


def _data_set(name: str, value: Any) -> Any:
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    kind = type(value).__name__
    if isinstance(value, DataLoader):
        raise ConfigError(
            f"{name}: is a DataLoader, and batches, order and workers are Descent's own work; give {name}=loader.dataset, "
            "batch={'size': …}, and data.collate where the loader has a collate_fn"
        )
    arrays = (torch.Tensor, np.ndarray)
    if isinstance(value, tuple) and value and all(isinstance(part, arrays) for part in value):
        lengths = {len(part) for part in value}
        if len(lengths) > 1:
            raise ConfigError(
                f"{name}: its {len(value)} arrays have {sorted(lengths)} rows; they must have as many each"
            )
        return TensorDataset(*(torch.as_tensor(part) for part in value))
    if isinstance(value, arrays):
        raise ConfigError(f"{name}: is one {kind}; give (inputs, targets), a list of samples, or a Dataset")
    if hasattr(value, "iloc") and hasattr(value, "columns"):
        raise ConfigError(
            f"{name}: is a table ({kind}), which doesn't say what its target is; give (inputs, targets) as arrays, or a file "
            "with data='csv' and **{'data.path': …, 'data.target': …}"
        )
    return value


def call_of(overrides: Sequence[str]) -> str:
    """How a run with objects was called, for people.

    >>> call_of(["model=custom", "model._target_=descent.given.model.Net", "epochs=3"])
    'descent.train(model=Net, epochs=3)'
    """
    words, hidden = [], set()
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if given.is_placeholder(value):
            name = given.keyword_of(value)
            hidden.add(f"{key.partition('.')[0]}=custom")
            words.append((name, value.rpartition(".")[2]))
        else:
            words.append((key, shown_override(override).partition("=")[2]))
    shown = [(key, value) for key, value in words if f"{key}={value}" not in hidden]
    dotted = [f"{key!r}: {value}" for key, value in shown if "." in key]
    plain = [f"{key}={value}" for key, value in shown if "." not in key]
    if dotted:
        plain.append("**{" + ", ".join(dotted) + "}")
    return f"descent.train({', '.join(plain)})"
