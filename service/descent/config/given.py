"""Objects that `descent.train` got from Python, in the place of a class that a config names.

In the config stands a placeholder, such as `_target_: descent.given.model.Net`. Only the register of this process says what
it stands for, and only `descent.train` and a worker of its run fill the register. On a command line or in a file the
placeholder is a name without an object, and is refused.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from descent.errors import ConfigError

PREFIX = "descent.given."
_USED_AS_THEY_ARE = ("task", "loss", "schedule", "data.collate")
"""Keys whose functions are meant themselves; under others a function is called, and gives the object."""

_register: dict[str, Any] = {}
"""Placeholder -> object."""


def placeholder(key: str, given: Any) -> str:
    """The `_target_` that stands for an object under a key of the config; it names its class or function for people.

    >>> placeholder("data.train", [1, 2])
    'descent.given.data.train.list'
    """
    named = given if inspect.isclass(given) or inspect.isroutine(given) else type(given)
    label = "".join(c for c in getattr(named, "__name__", "object") if c.isalnum() or c == "_")
    return f"{PREFIX}{key}.{label if label.isidentifier() else 'object'}"


@contextmanager
def registered(objects: Mapping[str, Any]) -> Iterator[None]:
    """Within the block the placeholders stand for these objects."""
    before = dict(_register)
    register(objects)
    try:
        yield
    finally:
        _register.clear()
        _register.update(before)


def register(objects: Mapping[str, Any]) -> None:
    """Let the placeholders stand for these objects from now on."""
    _register.update(objects)


def all_registered() -> dict[str, Any]:
    """Placeholder -> object, as the register is now."""
    return dict(_register)


def placeholders(tree: Any) -> Iterator[str]:
    """The placeholders in a config, in its order."""
    if isinstance(tree, Mapping):
        target = tree.get("_target_")
        if is_placeholder(target):
            yield str(target)
        for value in tree.values():
            yield from placeholders(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from placeholders(value)


def is_placeholder(target: Any) -> bool:
    """Whether a `_target_` stands for an object from Python."""
    return isinstance(target, str) and target.startswith(PREFIX)


def keyword_of(target: str) -> str:
    """The argument of `descent.train` that a placeholder's object was given as.

    >>> keyword_of("descent.given.data.train.list"), keyword_of("descent.given.data.evaluate.list")
    ('data', 'evaluate_data')
    """
    key = target.removeprefix(PREFIX).rpartition(".")[0]
    return {"data.train": "data", "data.evaluate": "evaluate_data"}.get(key, key)


def missing(tree: Any) -> list[str]:
    """The arguments of `descent.train` that a config needs and that this process doesn't have."""
    return list(dict.fromkeys(keyword_of(target) for target in placeholders(tree) if target not in _register))


def require_all(tree: Any, where: str, cure: str) -> None:
    """Raise ConfigError, which begins with `where`, if the config has a placeholder without an object.

    cure: a call of Python in which `{}` stands for the arguments that are missing.
    """
    lacking = missing(tree)
    if lacking:
        named = [f"**{{{name!r}: …}}" if "." in name else f"{name}=…" for name in lacking]
        raise ConfigError(
            f"{where}: {' and '.join(lacking)} came from Python as objects, which no config can name, so they must be "
            f"given again: {cure.format(', '.join(named))}"
        )


def resolve(target: str, where: str) -> Callable[..., Any]:
    """What is called to get the object of a placeholder, as `build` calls a class.

    A class, and a function that makes the object, is called itself. Of another object each call gives a copy, so that
    what the run does to it leaves the user's own alone; data sets, which only are read, are given as they are.

    Raises ConfigError for a placeholder without an object.
    """
    if target not in _register:
        key = keyword_of(target)
        raise ConfigError(
            f"{where}={target}: stands for an object that descent.train got from Python, and here is none; "
            f"use descent.train({key}=…), or name a class of a module"
        )
    given = _register[target]
    key = target.removeprefix(PREFIX).rpartition(".")[0]
    if inspect.isclass(given) or (is_maker(given) and key not in _USED_AS_THEY_ARE):
        made: Callable[..., Any] = given
        return made
    if is_maker(given) and _num_required(given) == 0:
        made = given
        return made
    return functools.partial(_give, target, given, key)


def is_maker(given: Any) -> bool:
    """Whether an object is a function (or a method, or a partial of one) or a class."""
    return inspect.isclass(given) or inspect.isroutine(given) or isinstance(given, functools.partial)


def builds_anew(target: Any) -> bool:
    """Whether the placeholder's object is made by a call each time, which may give something else each time."""
    return is_placeholder(target) and is_maker(_register.get(target))


def _give(target: str, given: Any, key: str, *args: Any, **kwargs: Any) -> Any:
    if is_maker(given):
        return functools.partial(given, *args, **kwargs) if args or kwargs else given
    if args or kwargs:
        names = ", ".join(f"{key}.{name}" for name in kwargs) or key
        raise ConfigError(
            f"{names}: {keyword_of(target)} is an object already, so it takes no arguments; give its class"
        )
    if key in ("data.train", "data.evaluate"):
        return given
    try:
        return copy.deepcopy(given)
    except Exception as error:  # whatever a user's class raises
        raise ConfigError(
            f"{keyword_of(target)}: this {type(given).__name__} can't be copied ({type(error).__name__}: {error}); "
            "give a function that builds it"
        ) from error


def _num_required(function: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
