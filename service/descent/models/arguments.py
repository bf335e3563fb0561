"""Checks of a network's arguments. An error names the key, its value and what would be right."""

import difflib
from collections.abc import Iterable, Sequence

from descent.errors import ConfigError


def choice(key: str, value: object, valid: Iterable[str]) -> str:
    """`value` if it is one of `valid`; otherwise raises ConfigError with the most similar one.

    >>> choice("model.activation", "rellu", ["relu", "tanh"])
    Traceback (most recent call last):
    ...
    descent.errors.ConfigError: model.activation=rellu: did you mean relu? (one of relu, tanh)
    """
    names = list(valid)
    if isinstance(value, str) and value in names:
        return value
    similar = difflib.get_close_matches(str(value).lower(), names, 1, cutoff=0.5)
    hint = f"did you mean {similar[0]}? (one of {', '.join(names)})" if similar else ""
    raise ConfigError(f"{key}={shown(value)}: {hint or 'must be one of ' + ', '.join(names)}")


def count(key: str, value: object, least: int = 1) -> int:
    """`value` if it is a whole number, `least` or more; otherwise raises ConfigError."""
    # Python counts a bool as an int, but 'depth: true' is a typing error.
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    raise ConfigError(f"{key}={shown(value)}: must be a whole number, {least} or more")


def probability(key: str, value: object) -> float:
    """`value` as a float if it is a number in [0, 1); otherwise raises ConfigError."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
        return float(value)
    raise ConfigError(f"{key}={shown(value)}: must be at least 0 and below 1")


def positive(key: str, value: object) -> float:
    """`value` as a float if it is a finite number above zero; otherwise raises ConfigError."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
        return float(value)
    raise ConfigError(f"{key}={shown(value)}: must be a number above 0")


def flag(key: str, value: object) -> bool:
    """`value` if it is true or false; otherwise raises ConfigError.

    Without this check Python would take the string 'no' for true.
    """
    if isinstance(value, bool):
        return value
    raise ConfigError(f"{key}={shown(value)}: must be true or false")


def sizes(key: str, value: object) -> tuple[int, ...]:
    """`value` as a tuple if it is a non-empty list of whole numbers above 0; otherwise raises ConfigError."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0:
        whole = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value)
        if whole:
            return tuple(value)
    raise ConfigError(f"{key}={shown(value)}: must be a list of whole numbers, 1 or more each")


def input_sizes(value: object, example: str) -> tuple[int, ...]:
    """`model.input_shape` as a tuple. Raises ConfigError for null: then the data set doesn't define it either."""
    if value is None:
        raise ConfigError(
            f"model.input_shape=null: the data set doesn't define it; set it, e.g. model.input_shape={example}"
        )
    return sizes("model.input_shape", value)


def outputs(value: object) -> int:
    """`model.num_outputs` as an int. Raises ConfigError for null: then the data set doesn't define it either."""
    if value is None:
        raise ConfigError("model.num_outputs=null: the data set doesn't define it; set it, e.g. model.num_outputs=10")
    return count("model.num_outputs", value)


def shown(value: object) -> str:
    """A value as a user would type it in an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(shown(v) for v in value) + "]"
    return str(value)
