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
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from descent.errors import ConfigError, DescentError

TRUSTED = (
    "torch.nn",
    "torch.optim",
    "torch.utils.data",
    "descent.models",
    "descent.data",
    "descent.optim",
    "descent.training",
)
"""Classes that live under these are built without asking. Of our own package only what a
config has a reason to name: not the store, not the cluster."""

_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_RESERVED = ("_target_", "_partial_", "_args_")


def _under(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def in_one_line(error: BaseException) -> str:
    """A user's exception as `Kind: message (file.py, line 3)`; the place is where it was raised."""
    message = " ".join(str(error).split())[:300]
    said = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if isinstance(error, SyntaxError):
        return said  # has its place in its message
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(__file__).resolve().parent.parent
    theirs = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename
        and frame.filename.endswith(".py")
        and not Path(frame.filename).is_relative_to(ours)
        and not frame.filename.startswith(_STANDARD_LIBRARY)
    ]
    return f"{said} ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else said


def _import(path: str, where: str) -> tuple[Any, list[str]]:
    """The longest prefix of `path` that is a module, and the names that are left."""
    parts = path.split(".")
    failure = ""
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            return importlib.import_module(name), parts[cut:]
        except ModuleNotFoundError as error:
            # Only 'this very module is missing' means that we look one level up;
            # a module that exists and fails on an import of its own must say so.
            if error.name is None or not _under(name, (error.name,)):
                raise ConfigError(f"{where}={path}: importing {name} failed: {in_one_line(error)}") from error
            failure = failure or f"there is no module {error.name!r}"
        except (Exception, SystemExit) as error:  # a script without `if __name__` may exit
            raise ConfigError(f"{where}={path}: importing {name} failed: {in_one_line(error)}") from error
    raise ConfigError(f"{where}={path}: {failure}; is its folder the current one, or installed?")


def _locate(path: str, where: str) -> Any:
    found, rest = _import(path, where)
    for part in rest:
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [n for n in dir(found) if n[0] != "_"], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{where}={path}: {getattr(found, '__name__', found)} has no {part!r}{hint}")
        found = getattr(found, part)
    return found


def _is_at_home(found: Any) -> bool:
    """Whether the class is what its own module has under its own name: `__module__` may lie."""
    home: Any = sys.modules.get(str(found.__module__))
    for part in str(found.__qualname__).split("."):
        home = getattr(home, part, None)
    return home is found


def resolve_target(path: str, trusted_modules: Iterable[str], where: str) -> Any:
    """The class (or, in the user's own modules, any callable) at `path`.

    Raises ConfigError if what it resolves to lives outside the trusted prefixes,
    whatever name it was reached by.
    """
    trusted_modules = tuple(trusted_modules)
    allowed = TRUSTED + trusted_modules
    if not isinstance(path, str) or not _is_dotted(path):
        raise ConfigError(f"{where}={path}: needs the form package.module.Class")
    # The path is checked before anything is imported: importing runs code.
    if not _under(path, allowed):
        raise ConfigError(
            f"{where}={path}: not under the trusted modules ({', '.join(allowed)}); "
            f"if it is yours, add trusted_modules=[{path.split('.')[0]}]"
        )
    found = _locate(path, where)
    home = str(getattr(found, "__module__", None) or "")
    by_user = _under(home, trusted_modules)
    if inspect.ismodule(found):
        raise ConfigError(f"{where}={path}: is a module, not a class")
    if not _under(home, allowed) or (inspect.isclass(found) and not by_user and not _is_at_home(found)):
        name = f"{home}.{getattr(found, '__qualname__', type(found).__qualname__)}".lstrip(".")
        raise ConfigError(f"{where}={path}: resolves to {name}, outside the trusted modules ({', '.join(allowed)})")
    if not (inspect.isclass(found) or (by_user and callable(found))):
        raise ConfigError(f"{where}={path}: is not a class")
    return found


def _is_dotted(path: str) -> bool:
    parts = path.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


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
        return f"{where}: {in_one_line(error)}"
    name = getattr(target, "__name__", str(target))
    takes = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in kwargs:
            if key not in takes:
                near = difflib.get_close_matches(key, takes, 1)
                hint = f"it takes {', '.join(takes) or 'none'}"
                if near:
                    hint = f"did you mean {where}.{near[0]}?"
                return f"{where}.{key}: {name} has no such argument; {hint}"
    for key in takes:
        if parameters[key].default is inspect.Parameter.empty and key not in kwargs:
            return f"{where}.{key}: {name} needs it; add +{where}.{key}=…"
    return f"{where}: {name} refused its arguments: {in_one_line(error)}"


def build(spec: Mapping[str, Any], trusted_modules: Iterable[str], where: str, **extra: Any) -> Any:
    """Build what `spec["_target_"]` names, nested specs first; `extra` joins its arguments.

    Raises ConfigError naming `where` (the key in the config) for everything that the
    config's author can mend; errors of Descent's own classes pass as they are.
    """
    trusted = tuple(trusted_modules)
    target = resolve_target(spec["_target_"], trusted, f"{where}._target_")
    kwargs = {key: _arguments(value, trusted, f"{where}.{key}") for key, value in spec.items() if key not in _RESERVED}
    kwargs.update(extra)
    given = spec.get("_args_", [])
    if not isinstance(given, list):
        raise ConfigError(f"{where}._args_={given}: must be a list of positional arguments")
    partial = spec.get("_partial_", False)
    if not isinstance(partial, bool):
        raise ConfigError(f"{where}._partial_={partial}: must be true or false")
    args = _arguments(given, trusted, f"{where}._args_")
    if partial:
        return functools.partial(target, *args, **kwargs)
    try:
        return target(*args, **kwargs)
    except DescentError:
        raise
    except TypeError as error:
        # One from within the user's own code is theirs, not a matter of which arguments there are.
        inside = error.__traceback__ is not None and error.__traceback__.tb_next is not None
        if inside and _binds(target, args, kwargs):
            name = getattr(target, "__name__", str(target))
            raise ConfigError(f"{where}: {name} failed: {in_one_line(error)}") from error
        raise ConfigError(_explain(target, kwargs, error, where)) from error
    except (Exception, SystemExit) as error:
        name = getattr(target, "__name__", str(target))
        raise ConfigError(f"{where}: {name} failed: {in_one_line(error)}") from error


def _binds(target: Any, args: list[Any], kwargs: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(target).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True
