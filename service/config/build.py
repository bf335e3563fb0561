"""The gate: the only way from a `_target_` in a config to a Python object.

A config may come from a colleague, a registry or an old run, so it must not be
able to call whatever it likes. Hydra's own list of forbidden targets is not a
boundary; here the object that a dotted path *resolves to* is looked at, and it
alone is called.
"""

import difflib
import functools
import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from service.errors import ConfigError, DescentError

TRUSTED = (
    "torch.nn",
    "torch.optim",
    "torch.utils.data",
    "service.models",
    "service.data",
    "service.training",
)
"""Classes that live under these are built without asking. Of our own package only what a
config has a reason to name: not the store, not the cluster."""

_RESERVED = ("_target_", "_partial_", "_args_")


def _under(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _locate(path: str, where: str) -> Any:
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{where}={path}: needs the form package.module.Class")
    module, failure = None, ""
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # Only 'this very module is missing' means that we look one level up;
            # a module that exists and fails on an import of its own must say so.
            if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
                failure = failure or f"there is no module {error.name!r}"
                continue
            raise ConfigError(f"{where}={path}: importing {name} failed: {error}") from error
        except Exception as error:
            raise ConfigError(
                f"{where}={path}: importing {name} failed: {type(error).__name__}: {error}"
            ) from error
        break
    if module is None:
        raise ConfigError(
            f"{where}={path}: {failure}; is its folder the current one, or installed?"
        )
    found: Any = module
    for part in parts[cut:]:
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [n for n in dir(found) if n[0] != "_"], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{where}={path}: {getattr(found, '__name__', found)} has no {part!r}{hint}"
            )
        found = getattr(found, part)
    return found


def resolve_target(path: str, trusted_modules: Iterable[str], where: str) -> Any:
    """The class (or, in the user's own modules, any callable) at `path`.

    Raises ConfigError if what it resolves to lives outside the trusted prefixes,
    whatever name it was reached by.
    """
    trusted_modules = tuple(trusted_modules)
    allowed = TRUSTED + trusted_modules
    first = path.split(".")[0]
    # The path is checked before anything is imported: importing runs code.
    if not _under(path, allowed):
        raise ConfigError(
            f"{where}={path}: not under the trusted modules ({', '.join(allowed)}); "
            f"if it is yours, add trusted_modules=[{first}]"
        )
    found = _locate(path, where)
    home = getattr(found, "__module__", None) or ""
    by_user = _under(home, trusted_modules)
    if not _under(home, allowed):
        raise ConfigError(f"{where}={path}: resolves to {home}.{getattr(found, '__qualname__', found)}, "
                          f"outside the trusted modules ({', '.join(allowed)})")  # fmt: skip
    if not (inspect.isclass(found) or (by_user and callable(found))):
        raise ConfigError(f"{where}={path}: is not a class")
    return found


def _arguments(spec: Any, trusted: tuple[str, ...], where: str) -> Any:
    if isinstance(spec, Mapping):
        if "_target_" in spec:
            return build(spec, trusted, where)
        return {key: _arguments(value, trusted, f"{where}.{key}") for key, value in spec.items()}
    if isinstance(spec, list):
        return [_arguments(item, trusted, f"{where}[{i}]") for i, item in enumerate(spec)]
    return spec


def _explain(target: Any, kwargs: Mapping[str, Any], error: TypeError, where: str) -> str:
    """A TypeError of a call, in the words of the config: which key, and the nearest valid one."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return f"{where}: {error}"
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in kwargs:
            if key not in parameters:
                near = difflib.get_close_matches(key, parameters, 1)
                hint = (
                    f"did you mean {where}.{near[0]}?"
                    if near
                    else f"it takes {', '.join(parameters)}"
                )
                return f"{where}.{key}: {target.__name__} has no such argument; {hint}"
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)  # fmt: skip
        if required and name not in kwargs:
            return f"{where}.{name}: {target.__name__} needs it; add +{where}.{name}=…"
    return f"{where}: {target.__name__} refused its arguments: {error}"


def build(spec: Mapping[str, Any], trusted_modules: Iterable[str], where: str, **extra: Any) -> Any:
    """Build what `spec["_target_"]` names, nested specs first; `extra` joins its arguments.

    Raises ConfigError naming `where` (the key in the config) for everything that the
    config's author can mend; errors of Descent's own classes pass as they are.
    """
    trusted = tuple(trusted_modules)
    target = resolve_target(spec["_target_"], trusted, f"{where}._target_")
    kwargs = {
        key: _arguments(value, trusted, f"{where}.{key}")
        for key, value in spec.items()
        if key not in _RESERVED
    }
    kwargs.update(extra)
    args = _arguments(list(spec.get("_args_", ())), trusted, f"{where}._args_")
    if spec.get("_partial_", False):
        return functools.partial(target, *args, **kwargs)
    try:
        return target(*args, **kwargs)
    except DescentError:
        raise
    except TypeError as error:
        raise ConfigError(_explain(target, kwargs, error, where)) from error
    except Exception as error:
        raise ConfigError(
            f"{where}: {target.__name__} failed: {type(error).__name__}: {error}"
        ) from error
