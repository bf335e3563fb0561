"""Translates `_target_`s of runs that were made when the package was called `service`."""

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
