"""Reads overrides in Hydra's grammar and refuses wrong ones, one by one, before Hydra composes."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from descent.config.schema import flatten
from descent.config.secrets import is_secret, redact
from descent.errors import ConfigError

SPECS = ("model", "data", "loss", "optimizer", "schedule")
"""Groups whose keys are arguments of a class; a user may add further arguments with `+`."""


_INSIDE_BRACES = re.compile(r"[A-Za-z_]\w*:[^{}]*$")
"""`min:1`, a piece of `{min:1,max:2}`."""


@dataclass(frozen=True)
class Override:
    """One override: the text as typed, and the key, action and value that Hydra reads from it."""

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
    """The override for a message, with `***` in place of a secret."""
    key, equals, _ = text.partition("=")
    return f"{key}=***" if equals and is_secret(key.lstrip("+~")) else redact(text)


def shown_value(value: Any, key: str = "") -> str:
    """A value as a user would type it; `***` if `key` names a secret.

    >>> shown_value(None), shown_value(True), shown_value("abc"), shown_value([1, "a"])
    ('null', 'true', 'abc', '[1, "a"]')
    """
    if is_secret(key):
        return "***"
    if isinstance(value, str):
        return redact(value)
    return redact(json.dumps(value, default=str, ensure_ascii=False))


def suggest(word: str, names: Iterable[str], before: str = "", after: str = "") -> str:
    """ "did you mean …?" with the most similar of `names`, or a list of them if none is similar.

    >>> suggest("resnte", ["mlp", "resnet"])
    "did you mean 'resnet'?"
    """
    names = list(names)
    close = difflib.get_close_matches(word, names, 1)
    if close:
        return f"did you mean '{before}{close[0]}{after}'?"
    return "there are: " + ", ".join(names[:16]) + (", …" if len(names) > 16 else "")


def parse(texts: Sequence[str], known: Mapping[str, Mapping[str, str]]) -> list[Override]:
    """Read overrides. `known` maps group -> option -> description.

    Raises ConfigError for a malformed override, for several values where a run has one, for an
    unknown option of a group, and for Hydra's own settings.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    return [_parse_one(parser, text, known) for text in texts]


def refuse_slips(texts: Sequence[str], keys: Callable[[], Iterable[str]]) -> None:
    """Refuse what a habit of other programs, or the shell, has made of an override; the error has the right words.

    These are options with dashes (`--lr 0.1`), spaces around '=' (`lr = 0.1`), and braces that were
    not quoted, which bash takes apart (`workers={min:1,max:2}` arrives as two words). `keys` gives
    all keys of a config.
    """
    for index, text in enumerate(texts):
        following = [*texts[index + 1 : index + 3], "", ""]
        if text.startswith("--"):
            name, equals, value = text.lstrip("-").partition("=")
            if not equals and following[0] and "=" not in following[0]:
                value = following[0]
            hint = f"settings have no dashes: {_whole_key(name, keys())}={value or '…'}"
        elif "=" not in text and text[:1] != "~" and following[0].startswith("="):
            value = following[0].removeprefix("=") or following[1]
            hint = f"without spaces around '=': {_whole_key(text, keys())}={value or '…'}"
        elif text.endswith("=") and text.count("=") == 1 and following[0] and "=" not in following[0]:
            hint = f"without spaces around '=': {_whole_key(text[:-1], keys())}={following[0]}"
        else:
            _refuse_taken_apart(texts, index)
            continue
        raise ConfigError(f"override {shown_override(text)!r}: needs the form key=value; {redact(hint)}")


def _refuse_taken_apart(texts: Sequence[str], index: int) -> None:
    key, equals, value = texts[index].partition("=")
    if not equals or not _INSIDE_BRACES.match(value):
        return
    parts = [value]
    for text in texts[index + 1 :]:
        if text.partition("=")[0] != key or not _INSIDE_BRACES.match(text.partition("=")[2]):
            break
        parts.append(text.partition("=")[2])
    if len(parts) > 1:
        raise ConfigError(
            f"override {shown_override(texts[index])!r}: the shell has taken the braces apart; "
            f"put quotes around it: '{key}={{{','.join(parts)}}}'"
        )


def _whole_key(name: str, keys: Iterable[str]) -> str:
    """The key that a user means by its last part, such as `optimizer.lr` for `lr`; otherwise `name` itself."""
    name = name.replace("-", "_")
    names = list(keys)
    ends = sorted((key for key in names if key.endswith(f".{name}")), key=lambda key: (key.count("."), key))
    return name if name in names or not ends else ends[0]


def _parse_one(parser: Any, text: str, known: Mapping[str, Mapping[str, str]]) -> Override:
    label = f"override {shown_override(text)!r}"
    if not text.lstrip("+~").partition("=")[0].strip() or ("=" not in text and text[:1] != "~"):
        raise ConfigError(f"{label}: needs the form key=value")
    try:
        read = parser.parse_override(text)
        value = None if read.is_sweep_override() else read.value()
    except Exception as error:  # the parser's own and those of its generated lexer
        raise ConfigError(
            f"{label}: can't be read; brackets and quotes must close, and a value with spaces or "
            "any of , : = [ ] { } needs quotes that the shell leaves: 'key=\"a, b\"'"
        ) from error
    if read.is_sweep_override():
        raise ConfigError(
            f"{label}: gives several values, and a run has one; a list is key=[a,b], a text with a comma 'key=\"a,b\"'"
        )
    key = read.key_or_group
    if key.split(".")[0] == "hydra":
        raise ConfigError(
            f"{label}: Hydra's own settings have no effect here; "
            "output_dir=… says where runs go, --config-dir where your groups are"
        )
    if read.package is not None:
        raise ConfigError(f"{label}: a group has its place; write {key}=OPTION")
    if "/" in key:
        raise ConfigError(f"{label}: there is no group {key!r}; did you mean {key.replace('/', '.')!r}?")
    kind = read.type.name
    action: Any = {"CHANGE": "change", "ADD": "add", "FORCE_ADD": "force", "DEL": "delete"}[kind]
    if key in known and action != "delete":
        _check_option(label, key, value, known[key])
    return Override(text, key, action, value)


def _check_option(label: str, group: str, value: Any, options: Mapping[str, str]) -> None:
    if value is None and group == "experiment":
        return
    if isinstance(value, list):
        raise ConfigError(f"{label}: group {group} takes one option; {suggest('', options)}")
    option = shown_value(value)
    if option not in options:
        raise ConfigError(f"{label}: group {group} has no option {option!r}; {suggest(option, options)}")


def check_keys(overrides: Sequence[Override], tree: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse the first override that changes a key which doesn't exist, or adds one that exists.

    `tree` is the composition of the groups alone, without the other overrides.
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
            # Hydra can't delete a key whose value is null: it takes the key for a missing one.
            raise ConfigError(f"{override}: {override.key} is null, and a null can't be deleted")
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
    hint = suggest(path[depth], sorted(names), parent, rest)
    whole = _whole_key(override.key, flatten(dict(tree))) if depth == 0 else override.key
    if whole != override.key:
        hint = f"did you mean '{whole}'?"
    if override.action == "change" and depth > 0 and path[0] in SPECS:
        hint += f" (a new argument: +{shown_override(override.text)})"
    what = "key" if depth or rest else "key or group"
    return f"there is no {what} {parent + path[depth]!r}; {hint}"
