"""From overrides to a `RunConfig`, with errors that say file, key, value and the nearest name."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from service.config.schema import RunConfig, flatten
from service.errors import ConfigError

_PRIMARY = "config"


@dataclass(frozen=True)
class Composed:
    """A composed configuration and where it came from."""

    config: RunConfig
    overrides: tuple[str, ...]
    choices: Mapping[str, str]
    """Group -> chosen option."""
    yaml: str
    config_dirs: tuple[str, ...] = ()


def config_dir() -> Path:
    """The folder of the packaged configs: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _search_path(config_dirs: Iterable[str]) -> list[Path]:
    extra = [Path(folder).resolve() for folder in config_dirs]
    for folder in extra:
        if not folder.is_dir():
            raise ConfigError(f"--config-dir={folder}: there is no such folder")
    return [*extra, config_dir()]


def groups(config_dirs: Iterable[str] = ()) -> dict[str, dict[str, str]]:
    """Group -> option -> its one line of description (the file's first comment but for `# @package`, which Hydra wants on top)."""
    found: dict[str, dict[str, str]] = {}
    for root in _search_path(config_dirs):
        for file in sorted(root.glob("*/*.yaml")):
            lines = file.read_text(encoding="utf-8").splitlines()
            comments = [x for x in lines if x.startswith("#") and not x.startswith("# @")]
            line = comments[0].lstrip("# ").strip() if comments else ""
            found.setdefault(file.parent.name, {}).setdefault(file.stem, line)
    return {group: dict(sorted(options.items())) for group, options in sorted(found.items())}


def _key_of(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0].split("@", 1)[0]


def _file_of(group: str, option: str, dirs: Iterable[str]) -> Path | None:
    for root in _search_path(dirs):
        file = root / group / f"{option}.yaml"
        if file.is_file():
            return file
    return None


def _near(word: str, names: Iterable[str]) -> str:
    names = list(names)
    close = difflib.get_close_matches(word, names, 1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"there are: {shown}"


def _hydra_compose(overrides: Sequence[str], dirs: tuple[str, ...]) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    roots = _search_path(dirs)
    path = ",".join(f"file://{root}" for root in roots[:-1])
    extra = [f"hydra.searchpath=[{path}]"] if path else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(roots[-1])):
        return hydra_compose(_PRIMARY, overrides=[*extra, *overrides], return_hydra_config=True)


def _explain(error: Exception, overrides: Sequence[str], dirs: tuple[str, ...]) -> NoReturn:
    """Turn what Hydra raised into one line."""
    known = groups(dirs)
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if "=" not in override and not override.startswith("~"):
            raise ConfigError(f"override {override!r}: needs the form key=value") from error
        if key in known and "." not in key and re.fullmatch(r"[\w-]+", value) and value != "null":
            if value not in known[key]:
                raise ConfigError(
                    f"override {override!r}: group {key} has no option {value!r}; {_near(value, known[key])}"
                ) from error
    message = " ".join(str(error).split())
    bad = re.search(r"(?:Could not override|override) '([^']+)'", message)
    name = _key_of(bad[1]) if bad else ""
    culprit = next((o for o in overrides if _key_of(o) == name), None)
    if culprit is not None:
        keys = _keys_without(culprit, overrides, dirs)
        parent, _, leaf = name.rpartition(".")
        names = [
            k[len(parent) + 1 if parent else 0 :].split(".")[0]
            for k in keys
            if k.startswith(f"{parent}." if parent else "")
        ]
        if names and leaf not in names:
            known_names = sorted(set(names) | (set(known) if not parent else set()))
            where = f"{parent}." if parent else ""
            hint = _near(leaf, known_names)
            add = f" (to add a new argument: +{culprit})" if parent.split(".")[0] in known else ""
            raise ConfigError(
                f"override {culprit!r}: there is no key {where}{leaf!r}; {hint}{add}"
            ) from error
        if parent and not names:
            top = _near(parent.split(".")[0], {k.split(".")[0] for k in keys})
            raise ConfigError(f"override {culprit!r}: there is no key {parent!r}; {top}") from error
    cause = f"override {culprit!r}: " if culprit else ""
    raise ConfigError(f"{cause}{message}") from error


def _keys_without(culprit: str, overrides: Sequence[str], dirs: tuple[str, ...]) -> list[str]:
    """The keys of the same composition but for one override: what could have been meant."""
    from omegaconf import OmegaConf

    for kept in ([o for o in overrides if o != culprit], []):
        try:
            node = _hydra_compose(kept, dirs)
        except Exception:
            continue
        plain = OmegaConf.to_container(node, resolve=False)
        assert isinstance(plain, dict)
        plain.pop("hydra", None)
        return list(flatten({str(k): v for k, v in plain.items()}))
    return []


def _where(
    loc: tuple[Any, ...],
    composed: Mapping[str, str],
    overrides: Sequence[str],
    dirs: tuple[str, ...],
) -> str:
    key = ".".join(str(part) for part in loc)
    for override in reversed(overrides):
        name = _key_of(override)
        if name == key or (name and key.startswith(name + ".") and "=" in override):
            if name not in composed:
                return f"override {override!r}: {key}"
    top = str(loc[0]) if loc else ""
    file = _file_of(top, composed[top], dirs) if top in composed else None
    if file is None and composed.get("experiment") not in (None, "null"):
        candidate = _file_of("experiment", composed["experiment"], dirs)
        if candidate is not None and re.search(
            rf"^\s*{re.escape(str(loc[-1]) if loc else '')}:", candidate.read_text(), re.M
        ):
            file = candidate
    return f"{(file or config_dir() / 'config.yaml').name}: {key}"


def _typed(
    plain: dict[str, Any],
    choices: Mapping[str, str],
    overrides: Sequence[str],
    dirs: tuple[str, ...],
) -> RunConfig:
    try:
        return RunConfig(**plain)
    except ValidationError as error:
        found = error.errors()
        # Of a union's several complaints the one on the deepest key is the one that helps.
        first = found[0]
        loc = tuple(p for p in first["loc"] if str(p) in _real_path(plain, first["loc"]))
        value = first.get("input")
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            names = _names_at(loc[:-1])
            message = f"there is no such key; {_near(str(loc[-1]), names)}"
        elif len({e["loc"][:1] for e in found}) == 1 and len(found) > 1:
            message = " or ".join(
                dict.fromkeys(
                    e["msg"].removeprefix("Value error, ").removeprefix("Input ") for e in found
                )
            )
        where = _where(loc, choices, overrides, dirs) if loc else "config"
        shown = "" if isinstance(value, dict) else f"={value!r}"
        raise ConfigError(f"{where}{shown}: {message[0].lower()}{message[1:]}") from error


def _real_path(plain: Any, loc: Sequence[Any]) -> list[str]:
    """The parts of pydantic's location that are keys of the config, without its union labels."""
    parts: list[str] = []
    node = plain
    for part in loc:
        if isinstance(node, Mapping) and part in node:
            node = node[part]
            parts.append(str(part))
        elif isinstance(node, Mapping) and part is loc[-1]:
            parts.append(str(part))
    return parts


def _names_at(loc: Sequence[Any]) -> list[str]:
    model: Any = RunConfig
    for part in loc:
        field = model.model_fields.get(str(part))
        model = field.annotation if field is not None else None
        if not hasattr(model, "model_fields"):
            return []
    return list(model.model_fields)


def compose(overrides: Sequence[str] = (), config_dirs: Sequence[str] = ()) -> Composed:
    """Compose configs/config.yaml, its groups and `overrides` (Hydra's own grammar).

    Raises ConfigError, in one line, for an unknown group, option or key (with the nearest
    name), a wrong type, a value out of range, or a missing value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    dirs = tuple(config_dirs)
    overrides = tuple(overrides)
    try:
        node = _hydra_compose(overrides, dirs)
        choices = {
            str(k): str(v)
            for k, v in node.hydra.runtime.choices.items()
            if not str(k).startswith("hydra")
        }
        OmegaConf.set_struct(node, False)
        del node["hydra"]
        missing = sorted(OmegaConf.missing_keys(node))
        if missing:
            raise ConfigError(
                f"{missing[0]} is not set: add {missing[0]}=… (see descent config --groups)"
            )
        plain = OmegaConf.to_container(node, resolve=True)
        yaml = OmegaConf.to_yaml(node, resolve=True)
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(
            f"{key or 'config'}: {' '.join(str(error).split('full_key')[0].split())}"
        ) from error
    except Exception as error:  # Hydra raises many kinds; all of them are the config's
        _explain(error, overrides, dirs)
    assert isinstance(plain, dict)
    config = _typed({str(k): v for k, v in plain.items()}, choices, overrides, dirs)
    return Composed(config, overrides, choices, yaml, dirs)


def recompose(saved: Mapping[str, Any]) -> RunConfig:
    """The `RunConfig` of an earlier run from what `RunConfig.to_dict` gave."""
    try:
        return RunConfig(**dict(saved))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"saved config: {key}: {first['msg']}") from error


@lru_cache(maxsize=4)
def completion_keys(dirs: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Words for the shell: `group=option` for every group, `key=` for every key."""
    from omegaconf import OmegaConf

    node = _hydra_compose([], dirs)
    OmegaConf.set_struct(node, False)
    del node["hydra"]
    plain = OmegaConf.to_container(node, resolve=False)
    assert isinstance(plain, dict)
    words = [f"{g}={o}" for g, options in groups(dirs).items() for o in options]
    return (*words, *(f"{key}=" for key in flatten({str(k): v for k, v in plain.items()})))
