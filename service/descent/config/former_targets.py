"""Targets of runs that were made when the package was called `service`: they still resume."""

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
"""Former module or package -> where its classes are now; the more exact prefix comes first."""


def current_target(path: str) -> str:
    """The dotted path under which a target is found today.

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
    """A copy of a config tree in which each `_target_` has the path of today."""
    if isinstance(tree, Mapping):
        return {
            key: current_target(value) if key == "_target_" and isinstance(value, str) else with_current_targets(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [with_current_targets(item) for item in tree]
    return tree
