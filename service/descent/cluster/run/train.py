"""Training from Python: `descent.train`."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from descent.cluster.run.console import SilentConsole, Starting
from descent.cluster.run.objects import is_object, split_objects
from descent.cluster.run.result import RunResult
from descent.cluster.run.resume import with_implied_length
from descent.config import Composed, RunConfig, compose
from descent.config.given import registered
from descent.config.import_path import append_current_folder
from descent.config.schema import flatten
from descent.errors import ConfigError, DescentError

Overrides = Sequence[str] | Mapping[str, Any]
_WHOLE = ("workers",)
"""Keys that a mapping is a value of; under all others it is a section of further keys."""


def train(
    config: Overrides | RunConfig | Composed = (),
    *,
    config_dirs: Sequence[str | Path] = (),
    progress: bool = False,
    **more: Any,
) -> RunResult:
    """Train a model and return what came of it; the same as the command `descent train`.

    config: one of
        overrides as the command line has them: `["experiment=digits", "optimizer.lr=0.1"]`,
        overrides as a mapping, nested or dotted: `{"experiment": "digits", "optimizer": {"lr": 0.1}}`,
        a whole configuration: what `descent.config.compose` returned, or its `RunConfig`.
    more: further keys of the config, as Python's keywords: `epochs=5`, `optimizer={"lr": 0.1}`, `**{"optimizer.lr": 0.1}`.
        Some of them also take objects, classes and functions as they are, from a notebook's cell too:
        model: a network, or a class or function that makes one; task, loss, schedule: what the config's groups name;
        data, evaluate_data: a map-style Dataset, a list of samples, or a tuple of tensors (inputs, targets).
        Objects travel to the workers through Ray and are written nowhere, so a resume must be given them again.
    config_dirs: folders with configuration groups of your own.
    progress: show on stderr what the command line shows; without it, warnings alone go to the logger `descent`.

    In a process that is connected to Ray already the run uses that connection and leaves it open;
    otherwise it starts a private cluster on this machine, or joins `ray.address`, and ends that again.

    In the main thread, Ctrl-C, SIGTERM and SIGHUP end the run at the end of the current step, with a
    checkpoint; the result's state is then "KILLED". A run whose training failed has the state
    "FAILED" and a reason; both keep their checkpoints, and `resume` goes on with them.

    Raises DescentError, before anything starts, for whatever has to be corrected first: ConfigError,
    DataError, CheckpointError, StoreError, TrackingError, ClusterError.

        import descent

        result = descent.train(["experiment=digits", "epochs=5"])
        print(result.metrics["eval/accuracy"], result.checkpoint)
        model = descent.load(result.run_dir)

        descent.train({"resume": result.name, "epochs": 10})

        descent.train(model=Net(), data=(inputs, targets), loss=my_loss, epochs=5, optimizer={"lr": 0.1})
    """
    from descent.cluster.run.run import Run

    started_at = time.time()
    console = Console(stderr=True) if progress else SilentConsole()
    starting = Starting(console)
    try:
        composed, objects = _with_objects(config, config_dirs, more)
        try:
            with registered(objects), Run(composed, console, started_at, starting) as run:
                return run.execute()
        except DescentError as error:
            raise composed.located(error) from None
    finally:
        starting.stop()


def _with_objects(
    config: Overrides | RunConfig | Composed, config_dirs: Sequence[str | Path], more: Mapping[str, Any]
) -> tuple[Composed, dict[str, Any]]:
    """The configuration, and the objects that its placeholders stand for."""
    if not more:
        return _composed(config, config_dirs), {}
    if isinstance(config, Composed | RunConfig):
        raise ConfigError(f"{next(iter(more))}=…: goes with overrides, not with a whole configuration")
    objects = {key: value for key, value in more.items() if is_object(key, value)}
    dirs = [str(folder) for folder in config_dirs]
    of_objects, register = split_objects(objects, dirs)
    plain = overrides_of({key: value for key, value in more.items() if key not in objects})
    typed = overrides_of(config) if isinstance(config, Mapping) else [str(override) for override in config]
    with registered(register):
        return compose_overrides([*typed, *of_objects, *plain], dirs), register


def _composed(config: Overrides | RunConfig | Composed, config_dirs: Sequence[str | Path]) -> Composed:
    if isinstance(config, Composed):
        return config
    dirs = [str(folder) for folder in config_dirs]
    if isinstance(config, RunConfig):
        from descent.config.secrets import masked

        yaml = _yaml(masked(config.to_dict()))
        return Composed(config, overrides=(), choices={}, yaml=yaml, config_dirs=tuple(dirs))
    if isinstance(config, str):
        raise ConfigError(f"config={config!r}: overrides are a list of texts, such as [{config!r}]")
    overrides = overrides_of(config) if isinstance(config, Mapping) else [str(override) for override in config]
    return compose_overrides(overrides, dirs)


def compose_overrides(overrides: Sequence[str], config_dirs: Sequence[str]) -> Composed:
    """Compose what was typed; the working directory's modules can be imported from then on.

    Raises ConfigError, in one line, for whatever is wrong in it.
    """
    append_current_folder()
    return compose(with_implied_length(overrides), config_dirs)


def overrides_of(tree: Mapping[str, Any]) -> list[str]:
    """A mapping, nested or dotted, as overrides.

    >>> overrides_of({"experiment": "digits", "optimizer": {"lr": 0.1}, "trusted_modules": ["nets"]})
    ['experiment=digits', 'optimizer.lr=0.1', "trusted_modules=['nets']"]
    """
    values = {key: tree[key] for key in _WHOLE if key in tree}
    sections = flatten({key: value for key, value in tree.items() if key not in _WHOLE})
    return [f"{key}={_override_value(value)}" for key, value in {**sections, **values}.items()]


def _override_value(value: Any) -> str:
    """A value in Hydra's grammar: a plain word as it is, other text in quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value if value.replace("_", "").isalnum() else _quoted(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{_inner_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_inner_value(v) for v in value) + "]"
    if isinstance(value, Path):
        return _quoted(str(value))
    return str(value)


def _inner_value(value: Any) -> str:
    return _quoted(value) if isinstance(value, str) else _override_value(value)


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _yaml(tree: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(tree, sort_keys=False)
