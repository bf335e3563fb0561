"""Overrides as they are typed: Hydra's grammar, refused one by one before anything is composed."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from descent.config.secrets import is_secret, redact
from descent.errors import ConfigError

SPECS = ("model", "data", "loss", "optimizer", "schedule")
"""Groups whose keys are arguments of a class, so that a user's own may be added with `+`."""


@dataclass(frozen=True)
class Override:
    """One override: what was typed, and what Hydra reads in it."""

    text: str
    key: str
    action: Literal["change", "add", "force", "delete"]
    value: Any

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(self.key.split("."))

    def __str__(self) -> str:
        return f"override {shown_override(self.text)!r}"


def shown_override(text: str) -> str:
    """The override without what it may hold of secrets."""
    key, equals, _ = text.partition("=")
    return f"{key}=***" if equals and is_secret(key.lstrip("+~")) else redact(text)


def shown_value(value: Any, key: str = "") -> str:
    """A value as one would type it; a secret's is hidden.

    >>> shown_value(None), shown_value(True), shown_value("abc"), shown_value([1, "a"])
    ('null', 'true', 'abc', '[1, "a"]')
    """
    if is_secret(key):
        return "***"
    if isinstance(value, str):
        return redact(value)
    return redact(json.dumps(value, default=str, ensure_ascii=False))


def near(word: str, names: Iterable[str], before: str = "", after: str = "") -> str:
    """'did you mean …?', or what there is if nothing is near.

    >>> near("resnte", ["mlp", "resnet"])
    "did you mean 'resnet'?"
    """
    names = list(names)
    close = difflib.get_close_matches(word, names, 1)
    if close:
        return f"did you mean '{before}{close[0]}{after}'?"
    return "there are: " + ", ".join(names[:16]) + (", …" if len(names) > 16 else "")


def parse(texts: Sequence[str], known: Mapping[str, Mapping[str, str]]) -> list[Override]:
    """Read overrides and refuse what no composition could take.

    `known` is group -> options. Raises ConfigError for a malformed override, several values
    where a run has one, an unknown option of a group, and Hydra's own settings.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    return [_parse_one(parser, text, known) for text in texts]


def _parse_one(parser: Any, text: str, known: Mapping[str, Mapping[str, str]]) -> Override:
    said = f"override {shown_override(text)!r}"
    if not text.lstrip("+~").partition("=")[0].strip() or ("=" not in text and text[:1] != "~"):
        raise ConfigError(f"{said}: needs the form key=value")
    try:
        read = parser.parse_override(text)
        value = None if read.is_sweep_override() else read.value()
    except Exception as error:  # the parser's own and those of its generated lexer
        raise ConfigError(
            f"{said}: can't be read; brackets and quotes must close, and a value with spaces or "
            "any of , : = [ ] { } needs quotes that the shell leaves: 'key=\"a, b\"'"
        ) from error
    if read.is_sweep_override():
        raise ConfigError(
            f"{said}: gives several values, and a run has one; a list is key=[a,b], a text with a comma 'key=\"a,b\"'"
        )
    key = read.key_or_group
    if key.split(".")[0] == "hydra":
        raise ConfigError(
            f"{said}: Hydra's own settings have no effect here; "
            "output_dir=… says where runs go, --config-dir where your groups are"
        )
    if read.package is not None:
        raise ConfigError(f"{said}: a group has its place; write {key}=OPTION")
    if "/" in key:
        raise ConfigError(f"{said}: there is no group {key!r}; did you mean {key.replace('/', '.')!r}?")
    kind = read.type.name
    action: Any = {"CHANGE": "change", "ADD": "add", "FORCE_ADD": "force", "DEL": "delete"}[kind]
    if key in known and action != "delete":
        _check_option(said, key, value, known[key])
    return Override(text, key, action, value)


def _check_option(said: str, group: str, value: Any, options: Mapping[str, str]) -> None:
    if value is None and group == "experiment":
        return
    if isinstance(value, list):
        raise ConfigError(f"{said}: group {group} takes one option; {near('', options)}")
    option = shown_value(value)
    if option not in options:
        raise ConfigError(f"{said}: group {group} has no option {option!r}; {near(option, options)}")


def check_keys(overrides: Sequence[Override], tree: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse the first override whose key isn't there (or, to be added, is there already).

    `tree` is the composition of the groups alone.
    """
    groups = set(known)
    added: set[tuple[str, ...]] = set()
    for override in overrides:
        if override.key in groups:
            continue
        path = override.path
        depth = _depth(tree, path)
        exists = depth == len(path) or any(path[: len(a)] == a for a in added)
        if override.action == "add" and exists:
            raise ConfigError(f"{override}: {override.key} is there already; leave the + out to change it")
        if override.action in ("add", "force"):
            added.add(path)
        elif exists and override.action == "delete" and _value(tree, path) is None:
            # Hydra takes a null for a key that isn't there, and says so
            raise ConfigError(f"{override}: {override.key} is null, and a null can't be taken away")
        elif not exists:
            raise ConfigError(f"{override}: {_unknown(override, tree, depth, groups)}")


def _depth(tree: Any, path: Sequence[str]) -> int:
    for depth, part in enumerate(path):
        if not isinstance(tree, Mapping) or part not in tree:
            return depth
        tree = tree[part]
    return len(path)


def _value(tree: Any, path: Sequence[str]) -> Any:
    for part in path:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _unknown(override: Override, tree: Any, depth: int, groups: set[str]) -> str:
    path = override.path
    for part in path[:depth]:
        tree = tree[part]
    parent = "".join(f"{part}." for part in path[:depth])
    if not isinstance(tree, Mapping):
        return f"there is no key {override.key!r}; {parent[:-1]} is a single value"
    names = set(tree) if depth else set(tree) | groups
    rest = "".join(f".{part}" for part in path[depth + 1 :])
    hint = near(path[depth], sorted(names), parent, rest)
    if override.action == "change" and depth > 0 and path[0] in SPECS:
        hint += f" (a new argument: +{shown_override(override.text)})"
    what = "key" if depth or rest else "key or group"
    return f"there is no {what} {parent + path[depth]!r}; {hint}"
