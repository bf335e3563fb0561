"""The configuration: the one place that knows Hydra.

`compose(overrides)` gives a typed, frozen `RunConfig`; `build(spec)` turns a
`_target_` into an object through the one gate of trusted modules.
"""

from descent.config.build import build, resolve_target
from descent.config.compose import Composed, compose, recompose
from descent.config.files import groups
from descent.config.schema import RunConfig, WorkerRange, flatten

__all__ = [
    "Composed",
    "RunConfig",
    "WorkerRange",
    "build",
    "compose",
    "flatten",
    "groups",
    "recompose",
    "resolve_target",
]
