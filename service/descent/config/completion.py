"""Shell completion: the options of a group, the keys, and the values that a key allows."""

import contextlib
import io
import os
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from descent.config.compose import plain_tree
from descent.config.files import groups
from descent.config.overrides import shown_value
from descent.config.schema import RunConfig, flatten


def complete(incomplete: str, given: Sequence[str], config_dirs: Sequence[str] = ()) -> list[str]:
    """The words that complete `incomplete`.

    `given` holds the overrides typed before it: they choose groups, and so decide which keys exist.
    Never raises, because a shell can't show an error while it completes a word.
    """
    try:
        return [word for word in _words(incomplete, given, config_dirs) if word != incomplete]
    except Exception:
        return []


def _words(incomplete: str, given: Sequence[str], dirs: Sequence[str]) -> list[str]:
    plus = incomplete[: len(incomplete) - len(incomplete.lstrip("+~"))]
    key, equals, value = incomplete[len(plus) :].partition("=")
    known = groups(dirs)
    if equals and key in known:
        return [f"{plus}{key}={o}" for o in known[key] if o.startswith(value)]
    flat = flatten(_tree(given, dirs))
    if equals:
        values = [str(v) for v in _values(key)]
        if key in flat and not isinstance(flat[key], list | dict) and flat[key] != "???":
            values = [shown_value(flat[key], key), *values]
        return [f"{plus}{key}={v}" for v in dict.fromkeys(values) if v.startswith(value)]
    options = [f"{plus}{g}={o}" for g, all_of in known.items() for o in all_of if g.startswith(key)]
    keys = [f"{plus}{name}=" for name in flat if name.startswith(key)]
    words = _by_level(key, [*options, *keys])
    if len(words) == 1 and words[0].endswith("."):
        words = _by_level(words[0], [*options, *keys])
    if len(words) == 1 and words[0].endswith("="):
        # With a single word the shell would end the argument after the '='; with two it waits.
        words.append(words[0] + shown_value(flat[words[0][len(plus) : -1]], key))
    return words


def _by_level(typed: str, words: list[str]) -> list[str]:
    """Shorten `words` to the next level of their keys, as file completion shows folders before files."""
    level = typed.count(".")
    short: dict[str, None] = {}
    for word in words:
        name, equals, value = word.partition("=")
        parts = name.split(".")
        if "." not in typed and len(parts) > level + 1 and typed not in parts[:1]:
            short[".".join(parts[: level + 1]) + "."] = None
        else:
            short[name + equals + value] = None
    return list(short)


def _tree(given: Sequence[str], dirs: Sequence[str]) -> dict[str, Any]:
    try:
        return plain_tree([o for o in given if "=" in o], dirs)
    except Exception:  # an earlier override is wrong; the command itself reports that
        return plain_tree([], dirs)


def _values(key: str) -> Iterator[Any]:
    """The literal values that `RunConfig` allows for `key`."""
    kind: Any = RunConfig
    for part in key.split("."):
        field = kind.model_fields[part] if hasattr(kind, "model_fields") else None
        if field is None or part not in kind.model_fields:
            return
        kind = field.annotation
    yield from _literals(kind)


def _literals(kind: Any) -> Iterator[Any]:
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    elif kind is bool:
        yield from ("true", "false")
    elif kind is type(None):
        yield "null"
    elif get_origin(kind) in (Union, types.UnionType):
        for member in get_args(kind):
            yield from _literals(member)


def in_bash(answer_words: Callable[[], None]) -> None:
    """Run `answer_words`, the completion of the command line, under bash.

    bash splits words at '=' and ':': `model=re` arrives as the three words `model`, `=` and `re`,
    and bash replaces only the last one. This function joins the words again, runs
    `answer_words`, and prints only the part of each answer that follows the last split.
    """
    words = os.environ.get("COMP_WORDS", "").split("\n")
    at = min(int(os.environ.get("COMP_CWORD", "0") or 0), len(words) - 1)
    whole: list[str] = []
    for index, word in enumerate(words[: at + 1]):
        cut = word in ("=", ":") or (index > 0 and words[index - 1] in ("=", ":"))
        if cut and index > 2:
            whole[-1] += word
        else:
            whole.append(word)
    last = whole[-1]
    known = 0 if last == words[at] else len(last) - len("" if words[at] in "=:" else words[at])
    os.environ["COMP_WORDS"] = "\n".join(whole)
    os.environ["COMP_CWORD"] = str(len(whole) - 1)
    answer = io.StringIO()
    try:
        with contextlib.redirect_stdout(answer), contextlib.redirect_stderr(io.StringIO()):
            answer_words()
    finally:
        for line in answer.getvalue().splitlines():
            print(line[known:])
