"""Translates former names: `_target_`s of when the package was called `service`, and keys that have another name now."""

from collections.abc import Mapping
from typing import Any

_MOVED = {
    "service.training.muon": "descent.optim.muon",
    "service.training.optimizers": "descent.optim.optimizers",
    "service.training.plateau": "descent.optim.plateau",
    "service.training.schedules": "descent.optim.schedules",
    "service.data": "descent.data",
    "service.models": "descent.models",
    "service.training": "descent.training",
}
"""Former module or package -> its present path. A module comes before the package that holds it."""

_RENAMED = {"straggler": {"deal": "balance"}}
"""Section -> former key -> present key."""


def current_override(text: str) -> str:
    """An override with the present name of its key; any other one as it is.

    >>> current_override("straggler.deal=false")
    'straggler.balance=false'
    """
    key, equals, value = text.partition("=")
    bare = key.lstrip("+~")
    section, _, last = bare.partition(".")
    renamed = _RENAMED.get(section, {}).get(last)
    return text if renamed is None else f"{key[: len(key) - len(bare)]}{section}.{renamed}{equals}{value}"


def with_current_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a whole config in which each `_target_` and each key has its present name.

    A former key is there because somebody has set it, so it wins over the present one.
    """
    current: dict[str, Any] = {str(key): value for key, value in with_current_targets(tree).items()}
    for section, keys in _RENAMED.items():
        found = current.get(section)
        if isinstance(found, dict) and any(former in found for former in keys):
            here = {keys[key]: value for key, value in found.items() if key in keys}
            current[section] = {**{k: v for k, v in found.items() if k not in keys}, **here}
    return current


def current_target(path: str) -> str:
    """The present dotted path of a target; a path that never changed is returned as it is.

    >>> current_target("service.training.schedules.Cosine")
    'descent.optim.schedules.Cosine'
    >>> current_target("torch.nn.Linear")
    'torch.nn.Linear'
    """
    for former, current in _MOVED.items():
        if path.startswith(former + "."):
            return current + path[len(former) :]
    return path


def with_current_targets(tree: Any) -> Any:
    """A copy of a config tree in which each `_target_` has its present path."""
    if isinstance(tree, Mapping):
        return {
            key: current_target(value) if key == "_target_" and isinstance(value, str) else with_current_targets(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [with_current_targets(item) for item in tree]
    return tree
