"""Reads environment variables into a config (`${oc.env:NAME}`), and remembers what came from there.

A config is printed, kept in files and sent to a tracking server. So a variable whose name is that
of a secret is refused, and whatever any other variable contributes to is shown as `${oc.env:NAME}`.
To find it, the config is resolved twice: with the values, and with a placeholder for each of them.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from descent.config.secrets import MASK, hide, is_secret
from descent.errors import ConfigError

_PLACEHOLDER = re.compile(r"descent_variable_([0-9a-f]+)_")


def _placeholder(name: str) -> str:
    return f"descent_variable_{name.encode().hex()}_"


@contextmanager
def read_variables(*, placeholders: bool = False) -> Iterator[None]:
    """A context in which `${oc.env:NAME}` reads the environment, or with `placeholders` stands for NAME.

    Reading raises ConfigError for a variable that isn't set and has no default, and for one whose
    name is that of a secret.
    """
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("oc.env", _stand_in if placeholders else _read, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", _read, replace=True)


def _read(name: str, *default: Any) -> Any:
    if is_secret(name) or is_secret(name.lower()):
        raise ConfigError(
            f"${{oc.env:{name}}}: a config is printed and tracked, so no secret may get into it; "
            "leave it in the environment, where boto3 and MLflow find theirs"
        )
    if name in os.environ:
        hide(os.environ[name], f"${{oc.env:{name}}}")
        return os.environ[name]
    if default:
        if isinstance(default[0], str):
            hide(default[0], f"${{oc.env:{name}}}")
        return default[0]
    raise ConfigError(f"${{oc.env:{name}}}: this environment variable is not set")


def _stand_in(name: str, *_default: Any) -> str:
    return _placeholder(name)


def shown_tree(node: Any) -> Any:
    """The plain values of an OmegaConf node, with `${oc.env:NAME}` for what comes from the environment."""
    with read_variables(placeholders=True):
        return _shown(node)


def _shown(node: Any) -> Any:
    from omegaconf import DictConfig, ListConfig

    if isinstance(node, DictConfig):
        return {str(key): _shown_item(node, key) for key in node}
    if isinstance(node, ListConfig):
        return [_shown_item(node, index) for index in range(len(node))]
    if isinstance(node, str):
        return _PLACEHOLDER.sub(lambda m: f"${{oc.env:{bytes.fromhex(m[1]).decode()}}}", node)
    return node


def _shown_item(node: Any, key: Any) -> Any:
    from omegaconf.errors import OmegaConfBaseException

    try:
        return _shown(node[key])
    except (OmegaConfBaseException, ConfigError, ValueError):
        return MASK  # the variable decides which other key this one refers to, or it is no number


def with_shown_values(tree: Any, resolved: Any, shown: Any) -> Any:
    """A copy of `tree` in which each value that `shown` has otherwise than `resolved` is that of `shown`."""
    if isinstance(tree, Mapping):
        if isinstance(resolved, Mapping) and isinstance(shown, Mapping):
            return {key: with_shown_values(value, resolved.get(key), shown.get(key)) for key, value in tree.items()}
        return shown if resolved != shown else dict(tree)
    return shown if resolved != shown else tree


_REFERENCE = re.compile(r"\$\{oc\.env:([^,{}]+)\}")


def with_variables(tree: Any, where: str) -> Any:
    """A copy of a saved config in which each `${oc.env:NAME}` is replaced by the variable's value.

    A value that consists of nothing else may become a number or a bool, as YAML reads it.
    `where` is the setting that the message names. Raises ConfigError for a variable that isn't set,
    and for a secret, which no file keeps.
    """
    import yaml

    if isinstance(tree, Mapping):
        return {key: with_variables(value, f"{where}.{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [with_variables(value, where) for value in tree]
    if not isinstance(tree, str):
        return tree
    if tree == MASK:
        raise ConfigError(f"{where}: a secret, which the run did not keep")
    if alone := _REFERENCE.fullmatch(tree):
        text = _read(alone[1])
        value = yaml.safe_load(text) if text else text
        return value if isinstance(value, int | float | bool) else text
    return _REFERENCE.sub(lambda m: str(_read(m[1])), tree)
