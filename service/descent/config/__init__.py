"""The configuration: the one place that knows Hydra.

`compose(overrides)` returns a typed, frozen `RunConfig`. `build(spec)` makes an object from a
`_target_`; it calls only the classes on its list and the modules that the user trusts.
"""

from descent.config.build import build, build_function, check_arguments, resolve_target
from descent.config.compose import Composed, compose, recompose
from descent.config.files import groups
from descent.config.schema import RunConfig, WorkerRange, flatten

__all__ = [
    "Composed",
    "RunConfig",
    "WorkerRange",
    "build",
    "build_function",
    "check_arguments",
    "compose",
    "flatten",
    "groups",
    "recompose",
    "resolve_target",
]
