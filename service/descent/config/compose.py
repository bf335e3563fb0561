"""Composes a `RunConfig` from overrides; errors name the file, the key, the value and a similar name."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from descent.config.environment import read_variables, shown_tree, with_shown_values
from descent.config.files import PRIMARY, groups, option_file, search_path, shown
from descent.config.former_targets import current_override, with_current_names, with_current_targets
from descent.config.origin import Sources
from descent.config.overrides import Override, check_keys, parse, refuse_slips, shown_value, suggest
from descent.config.schema import Data, RunConfig, flatten
from descent.config.secrets import hide, is_secret, masked, redact
from descent.config.validation import validated
from descent.errors import ConfigError, DescentError


@dataclass(frozen=True)
class Composed:
    """A composed configuration, and the overrides, options and folders that it was composed from."""

    config: RunConfig
    overrides: tuple[str, ...]
    choices: Mapping[str, str]
    """Group -> chosen option."""
    yaml: str
    """For people to read: without secrets, and with `${oc.env:NAME}` for what comes from the environment."""
    config_dirs: tuple[str, ...] = ()
    sources: Sources | None = field(default=None, compare=False, repr=False)
    resolved: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The composed values before defaults of `RunConfig` are added; it may hold secrets."""
    shown: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The same values with `${oc.env:NAME}` for all that comes from the environment."""

    def without_secrets(self, config: RunConfig | None = None) -> dict[str, Any]:
        """`config` (by default the composed one) as plain values that may be kept and shown.

        A value that comes from the environment is shown as `${oc.env:NAME}`, a secret as `***`.
        """
        plain = (config or self.config).to_dict()
        tree = masked(with_shown_values(plain, self.resolved, self.shown))
        assert isinstance(tree, dict)
        return tree

    def without_secrets_in(self, group: str, tree: Mapping[str, Any]) -> Any:
        """The same for `tree`, which is the part `group` of the config with further keys filled in."""
        return masked(with_shown_values(tree, self.resolved.get(group), self.shown.get(group)), group)

    def located(self, error: DescentError) -> DescentError:
        """`error`, preceded by the name of the file that set the key at the start of its message.

        The file is named only where the user did not type the key (see `Sources.located`).
        """
        # A resumed run adds the overrides that it was started with; `sources` doesn't hold those.
        if self.sources is None or self.config.resume is not None:
            return error
        # Changed in place: a class of errors may take other arguments than a message.
        error.args = (self.sources.located(str(error)),)
        return error


def _hydra_compose(overrides: Sequence[str], dirs: Sequence[str]) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    packaged, *added = search_path(dirs)
    extra = []
    if added:
        path = ",".join(f'"file://{folder}"' for folder in added)
        extra = [f"hydra.searchpath=[{path}]"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(packaged)):
        return hydra_compose(PRIMARY, overrides=[*extra, *overrides], return_hydra_config=True)


def plain_tree(overrides: Sequence[str], dirs: Sequence[str] = ()) -> dict[str, Any]:
    """The composed keys and values before interpolations are resolved."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(_hydra_compose(overrides, dirs), resolve=False)
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items() if k != "hydra"}


_OPEN = (
    "metrics.",
    "observers.",
    "optimizer.phases.",
    "data.collate.",
    "data.sampler.",
    "data.evaluations.",
    "init_map.",
)
"""Sections whose keys the user names: an override of one needs no +."""


def compose(overrides: Sequence[str] = (), config_dirs: Sequence[str] = ()) -> Composed:
    """Compose configs/config.yaml, its groups and `overrides` (Hydra's own grammar).

    `config_dirs` are further folders of config groups.

    Raises ConfigError, in one line, for an unknown group, option or key (with the most similar
    name), a wrong type, a value out of range, or a missing value.
    """
    from omegaconf import OmegaConf

    dirs = tuple(str(Path(folder).expanduser().resolve()) for folder in config_dirs)
    overrides = [f"++{o}" if o.startswith(_OPEN) else o for o in overrides]
    search_path(config_dirs)
    known = groups(dirs)
    overrides = [current_override(override) for override in overrides]
    refuse_slips(overrides, lambda: flatten(plain_tree([], dirs)))
    parsed = parse(overrides, known)
    try:
        with read_variables():
            node = _hydra_compose(overrides, dirs)
    except Exception as error:  # Hydra raises many types, and each of them is about the config
        _explain(error, parsed, dirs, known)
    choices = {str(k): str(v) for k, v in node.hydra.runtime.choices.items() if not str(k).startswith("hydra")}
    OmegaConf.set_struct(node, False)
    del node["hydra"]
    sources = Sources(tuple(parsed), choices, dirs)
    raw = OmegaConf.to_container(node, resolve=False)
    assert isinstance(raw, dict)
    plain = _resolved(node, sources)
    _refuse_idle_data_keys({str(k): v for k, v in raw.items()}, sources)
    config = validated(plain, sources)
    _refuse_self_trust(config, sources)
    shown = with_current_targets(shown_tree(node))
    _hide_literals(plain)
    yaml = OmegaConf.to_yaml(OmegaConf.create(masked(with_shown_values(plain, plain, shown))))
    return Composed(config, tuple(overrides), choices, yaml, dirs, sources, plain, shown)


def _hide_literals(tree: Any, key: str = "") -> None:
    """Let `redact` know the secrets that stand in the config itself, so that no later message shows them."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            _hide_literals(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for value in tree:
            _hide_literals(value, key)
    elif isinstance(tree, str) and is_secret(key):
        hide(tree)


def _resolved(node: Any, sources: Sources) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with read_variables():
            _refuse_missing(sorted(OmegaConf.missing_keys(node)), sources)
            plain = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "config")
        cause = next((e for e in _causes(error) if isinstance(e, ConfigError)), None)
        reason = str(cause) if cause else redact(" ".join(str(error).split("full_key")[0].split()))
        where = sources.where(tuple(re.split(r"\.|\[", key)))
        raise ConfigError(f"{where}: {key}: {reason}") from error
    assert isinstance(plain, dict)
    return with_current_names({str(k): v for k, v in plain.items()})


def _refuse_missing(missing: Sequence[str], sources: Sources) -> None:
    if not missing:
        return
    key = missing[0]
    group = key.split(".")[0]
    chosen = f"{group}={sources.choices[group]} needs {key}" if group in sources.choices else key
    more = " trusted_modules=[my_module]" if key.endswith("_target_") else ""
    value = "my_module.MyClass" if more else "…"
    raise ConfigError(f"{chosen}, which is not set: add {key}={value}{more}")


def _refuse_idle_data_keys(raw: Mapping[str, Any], sources: Sources) -> None:
    """Refuse a key of `data` that no interpolation refers to: it is a typo and would have no effect."""
    data = raw.get("data")
    if not isinstance(data, Mapping):
        return
    written = [text for text in _texts(raw) if "${" in text]
    for key, value in data.items():
        if key in Data.model_fields:
            continue
        if not any(re.search(rf"\$\{{[^}}]*\b{re.escape(str(key))}\b", text) for text in written):
            names = sorted({*Data.model_fields, *map(str, data)} - {str(key)})
            rule = f"nothing refers to this key; {suggest(str(key), names, 'data.')}"
            raise ConfigError(sources.line(("data", str(key)), value, rule))


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _texts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value)


def _refuse_self_trust(config: RunConfig, sources: Sources) -> None:
    """Refuse `trusted_modules` in a config file: only an override, which the user types, may trust code."""
    if config.trusted_modules and sources.override_of(("trusted_modules",)) is None:
        file = shown(sources.file_of(("trusted_modules",)))
        setting = f"trusted_modules=[{','.join(config.trusted_modules)}]"
        raise ConfigError(f"{file}: {setting}: a file can't vouch for itself; add {setting} as an override")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain(
    error: Exception,
    overrides: Sequence[Override],
    dirs: Sequence[str],
    known: Mapping[str, Mapping[str, str]],
) -> NoReturn:
    """Raise Hydra's `error` as one line about a file that can't be read or a key that doesn't exist."""
    from hydra.errors import MissingConfigException
    from yaml import MarkedYAMLError

    for cause in _causes(error):
        if isinstance(cause, MarkedYAMLError):
            mark = cause.problem_mark
            place = f"{shown(Path(mark.name))}, line {mark.line + 1}" if mark else "a config file"
            raise ConfigError(f"{place}: is not valid YAML: {cause.problem}") from error
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            group, _, option = str(cause.missing_cfg_file).partition("/")
            file = _file_with_default(group, option, overrides, dirs)
            if group not in known:
                hint = f"there is no group {group!r}; {suggest(group, known)}"
            else:
                hint = f"group {group} has no option {option!r}; {suggest(option, known[group])}"
            raise ConfigError(f"{file}: defaults: {hint}") from error
    chosen = [o.text for o in overrides if o.key in known and o.action != "delete"]
    try:
        tree = plain_tree(chosen, dirs)
    except Exception as inner:
        message = redact(" ".join(str(inner).split()))
        raise ConfigError(f"{_experiment(overrides, dirs)}: {message}") from error
    check_keys(overrides, tree, known)
    raise ConfigError(redact(" ".join(str(error).split()))) from error


def _experiment(overrides: Sequence[Override], dirs: Sequence[str]) -> str:
    chosen = next((o for o in reversed(overrides) if o.key == "experiment"), None)
    file = option_file("experiment", shown_value(chosen.value), dirs) if chosen else None
    return shown(file) if file else "config"


def _file_with_default(group: str, option: str, overrides: Sequence[Override], dirs: Sequence[str]) -> str:
    """The file whose defaults list contains `group: option`."""
    for chosen in (o for o in overrides if o.action in ("change", "add")):
        file = option_file(chosen.key, shown_value(chosen.value), dirs)
        if file and re.search(rf"\b{re.escape(group)}.*:\s*{re.escape(option)}\b", file.read_text()):
            return shown(file)
    return _experiment(overrides, dirs)


def recompose(saved: Mapping[str, Any]) -> RunConfig:
    """The `RunConfig` of an earlier run, from the dict that `RunConfig.to_dict` returned."""
    try:
        return validated(with_current_names(saved), Sources((), {}, ()))
    except ConfigError as error:
        raise ConfigError(f"saved config: {error}") from error
