"""Makes a `RunConfig` from composed plain values and words pydantic's errors as errors of a config."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pydantic import ValidationError

from descent.config.origin import Key, Sources
from descent.config.overrides import shown_value, suggest
from descent.config.schema import RunConfig
from descent.errors import ConfigError

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list such as [a, b]",
    "dict": "a group of keys",
    "finite": "a finite number",
}
_BOUNDS = {
    "greater_than": ("larger than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("smaller than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def validated(plain: Mapping[str, Any], sources: Sources) -> RunConfig:
    """The `RunConfig` of `plain`.

    Raises ConfigError with the place, the key, its value and what would be right.
    """
    try:
        return RunConfig(**plain)
    except ValidationError as error:
        _refuse(error, plain, sources)


def _refuse(error: ValidationError, plain: Mapping[str, Any], sources: Sources) -> NoReturn:
    found = [(_path(plain, e), e) for e in error.errors()]
    # pydantic reports one error for each member of a union; the member that the user meant is the
    # one whose error lies deepest.
    top = found[0][1]["loc"][:1]
    alike = [(path, e) for path, e in found if e["loc"][:1] == top]
    deepest = max(len(path) for path, _ in alike)
    unknown = [path for path, e in alike if e["type"] == "extra_forbidden"]
    path = next(path for path in [*unknown, *(p for p, _ in alike)] if len(path) == deepest)
    these = [e for p, e in alike if p == path]
    value = these[0]["input"]
    kinds = {e["type"] for e in these}
    if not path:
        words = _message(these[-1])
        lengths = words.startswith("steps=")
        raise ConfigError(_two_lengths(plain, sources) if lengths else words) from error
    if path == ("experiment",):
        rule = "an experiment needs '# @package _global_' as its first line"
        raise ConfigError(f"{sources.where(path)}: {rule}") from error
    if "extra_forbidden" in kinds:
        hint = suggest(path[-1], _names_at(path[:-1]), "".join(f"{part}." for part in path[:-1]))
        raise ConfigError(sources.line(path, value, f"there is no such key; {hint}")) from error
    if "missing" in kinds:
        raise ConfigError(f"{sources.where(path)}: {'.'.join(path)} is needed") from error
    message = str(these[-1]["msg"])
    if "_target_" in message:
        path, value = (*path, "_target_"), value.get("_target_")
    ours = [_message(e) for e in these if e["type"] == "value_error"]
    if (ours and isinstance(value, Mapping)) or len(ours) == len(these):
        raise ConfigError(sources.line(path, value, ours[-1])) from error
    rules = dict.fromkeys(_rule(e) for e in these)
    raise ConfigError(sources.line(path, value, f"must be {' or '.join(rules)}")) from error


def _message(e: Mapping[str, Any]) -> str:
    return str(e["msg"]).removeprefix("Value error, ")


def _rule(e: Mapping[str, Any]) -> str:
    kind, context = str(e["type"]), e.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        limit = context[bound]
        return f"{words} {limit if isinstance(limit, int) else format(limit, 'g')}"
    if kind in ("model_type", "dataclass_type"):
        return f"{{{', '.join(_fields(context.get('class_name', '')))}}}"
    return _WORDS.get(kind.split("_")[0], _message(e))


def _fields(name: str) -> list[str]:
    from descent.config import schema

    return list(getattr(schema, name).model_fields) if hasattr(schema, name) else ["…"]


def _two_lengths(plain: Mapping[str, Any], sources: Sources) -> str:
    both = []
    for key in ("steps", "epochs"):
        override = sources.override_of((key,))
        where = "" if override is not None else f" (in {sources.where((key,))})"
        both.append((key, f"{key}={shown_value(plain.get(key))}{where}", override))
    (_, steps, _), (_, epochs, _) = both
    if plain.get("steps") is None:
        return f"{steps} and {epochs}: a run needs a length; set one of them"
    typed_keys = [key for key, _, override in both if override is not None]
    drop = "steps" if typed_keys == ["epochs"] else "epochs"
    return f"{steps} and {epochs}: a run has one length; add {drop}=null"


def _path(plain: Any, e: Mapping[str, Any]) -> Key:
    """The keys of the config in pydantic's location, which also holds labels of union members."""
    loc: Sequence[Any] = e["loc"]
    parts: list[str] = []
    node = plain
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(node, Mapping) and part in node:
            node = node[part]
            parts.append(str(part))
        elif last and e["type"] in ("missing", "extra_forbidden"):
            parts.append(str(part))
    return tuple(parts)


def _names_at(path: Key) -> list[str]:
    model: Any = RunConfig
    for part in path:
        field = model.model_fields.get(part)
        kinds = getattr(field.annotation, "__args__", (field.annotation,)) if field else ()
        model = next((k for k in kinds if hasattr(k, "model_fields")), None)
        if model is None:
            return []
    return list(model.model_fields)
