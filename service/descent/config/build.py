"""The gate: the only way from a `_target_` in a config to a Python object.

A config may come from a colleague, a registry or an old run, so it must not be able to call any
function it likes. Without `trusted_modules` a `_target_` can name only a class from the list in
`public_classes.py`. `trusted_modules`, which a user types, adds the user's own modules: there the
object that a dotted path resolves to is checked, and that object alone is called.
"""

import difflib
import functools
import importlib
import inspect
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from descent.config.given import is_placeholder
from descent.config.given import resolve as resolve_given
from descent.config.import_path import refuse_shadowed
from descent.config.public_classes import KINDS_BY_GROUP, is_public, public_class, public_names
from descent.config.secrets import redact
from descent.errors import ConfigError, DescentError

_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_RESERVED = ("_target_", "_partial_", "_args_")


def _under(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def in_one_line(error: BaseException) -> str:
    """An exception of a user's code as `Type: message (file.py, line 3)`, with the line that raised it."""
    message = redact(" ".join(str(error).split()))[:300]
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if isinstance(error, SyntaxError):
        return text  # its message names file and line already
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).resolve().parent.parent
    of_user = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename
        and frame.filename.endswith(".py")
        and not Path(frame.filename).is_relative_to(package)
        and not frame.filename.startswith(_STANDARD_LIBRARY)
    ]
    return f"{text} ({Path(of_user[-1].filename).name}, line {of_user[-1].lineno})" if of_user else text


def _import(path: str, where: str) -> tuple[Any, list[str]]:
    """The longest prefix of `path` that is a module, and the names behind it."""
    parts = path.split(".")
    failure = ""
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            return importlib.import_module(name), parts[cut:]
        except ModuleNotFoundError as error:
            # If this very module is missing, a shorter prefix is tried. If the module exists and
            # one of its own imports is missing, the user must see that.
            if error.name is None or not _under(name, (error.name,)):
                raise ConfigError(f"{where}={path}: importing {name} failed: {in_one_line(error)}") from error
            failure = failure or f"there is no module {error.name!r}"
        except (Exception, SystemExit) as error:  # a script without `if __name__` may exit
            raise ConfigError(f"{where}={path}: importing {name} failed: {in_one_line(error)}") from error
    raise ConfigError(f"{where}={path}: {failure}; is its folder the current one, or installed?")


def _locate(path: str, where: str) -> Any:
    found, rest = _import(path, where)
    for part in rest:
        if part.startswith("__"):
            raise ConfigError(f"{where}={path}: {part!r} is an internal name of Python and can't be built")
        if not hasattr(found, part):
            similar = difflib.get_close_matches(part, [n for n in dir(found) if n[0] != "_"], 1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise ConfigError(f"{where}={path}: {_described(found)} has no {part!r}{hint}")
        found = getattr(found, part)
    return found


def _described(found: object) -> str:
    """The name of a module, class or function; of any other object only its type, because its value may be a secret."""
    if inspect.ismodule(found) or inspect.isroutine(found) or inspect.isclass(found):
        return str(found.__name__)
    return f"a {type(found).__name__}"


def resolve_target(path: str, trusted_modules: Iterable[str], where: str) -> Callable[..., Any]:
    """The class at `path`; in the user's own modules any callable.

    `trusted_modules` are prefixes of the user's modules. `where` is the key in the config that
    holds `path`; its first part is the group, which decides what kinds of classes are allowed.

    Raises ConfigError if `path` names neither a class from the list of public classes nor an
    object that is defined under the trusted prefixes (whatever alias `path` reaches it by).
    """
    trusted_modules = tuple(trusted_modules)
    if not isinstance(path, str) or not _is_dotted(path):
        raise ConfigError(f"{where}={_of_type(path)}: needs the form package.module.Class")
    if is_placeholder(path):
        return resolve_given(path, where)
    # A path is imported only if it is trusted, because importing runs code.
    if _under(path, trusted_modules):
        return _trusted(path, trusted_modules, where)
    listed = public_class(path)
    group = where.split(".")[0].split("[")[0]
    if listed is None:
        raise ConfigError(_not_listed(path, trusted_modules, where, group))
    kinds = KINDS_BY_GROUP.get(group)
    holder = where.removesuffix("._target_")
    whole = holder in (group, "data.train", "data.evaluate", "data.test") or (
        group == "metrics" and holder.count(".") == 1
    )
    if kinds is not None and not whole:
        kinds = (*kinds, "module")  # an argument, such as the transform of a data set
    if kinds is not None and listed.kind not in kinds:
        raise ConfigError(
            f"{where}={path}: is a class of kind {listed.kind!r}; {group} needs {' or '.join(map(repr, kinds))}"
        )
    return listed.cls


def _not_listed(path: str, trusted_modules: tuple[str, ...], where: str, group: str) -> str:
    top, name = path.split(".")[0], path.rsplit(".", 1)[-1]
    trusted = ", ".join(trusted_modules) or "none"
    rule = (
        "is not a public class of torch.nn, torch.optim, torch.utils.data or Descent, "
        f"and not under the trusted modules ({trusted})"
    )
    if top in ("torch", "descent", "torchmetrics"):
        names = public_names(group)
        similar = difflib.get_close_matches(path, [n for n in names if n.endswith(f".{name}")] or names, 1)
        return f"{where}={path}: {rule}" + (f"; did you mean {similar[0]}?" if similar else "")
    return f"{where}={path}: {rule}; if it is yours, add trusted_modules=[{top}]"


def _trusted(path: str, trusted_modules: tuple[str, ...], where: str) -> Callable[..., Any]:
    """The callable at `path`, which lies under a trusted prefix."""
    refuse_shadowed(path.split(".")[0], where)
    found = _locate(path, where)
    if inspect.ismodule(found):
        raise ConfigError(f"{where}={path}: is a module, not a class")
    home = getattr(found, "__module__", None)
    if not (isinstance(home, str) and _under(home, trusted_modules)) and not is_public(found):
        name = f"{home}.{_described(found)}" if isinstance(home, str) else _described(found)
        trusted = ", ".join(trusted_modules)
        raise ConfigError(f"{where}={path}: resolves to {name}, outside the trusted modules ({trusted})")
    if not callable(found):
        raise ConfigError(f"{where}={path}: is not a class, but {_described(found)}")
    return found


def _is_dotted(path: str) -> bool:
    parts = path.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def _of_type(value: object) -> str:
    """A value of a config for a message: text and numbers as they are, of anything else the type."""
    return redact(str(value)) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"


def _arguments(spec: Any, trusted: tuple[str, ...], where: str) -> Any:
    if isinstance(spec, Mapping):
        if "_target_" in spec:
            return build(spec, trusted, where)
        return {key: _arguments(value, trusted, f"{where}.{key}") for key, value in spec.items()}
    if isinstance(spec, list):
        return [_arguments(item, trusted, f"{where}[{i}]") for i, item in enumerate(spec)]
    return spec


def _explain(target: Callable[..., Any], kwargs: Mapping[str, Any], error: TypeError, where: str) -> str:
    """The message for a TypeError of a call: which key is wrong or missing, and the most similar valid one."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return f"{where}: {in_one_line(error)}"
    if unknown := _unknown_argument(target, kwargs, where):
        return unknown
    name, valid = _described(target), _by_name(parameters)
    for key in valid:
        if parameters[key].default is inspect.Parameter.empty and key not in kwargs:
            return f"{where}.{key}: {name} needs it; add +{where}.{key}=…"
    return f"{where}: {name} refused its arguments: {in_one_line(error)}"


def _by_name(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _unknown_argument(target: Callable[..., Any], kwargs: Iterable[str], where: str) -> str | None:
    """The message for the first of `kwargs` that `target` has no argument for; None if there is none."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    valid = _by_name(parameters)
    for key in kwargs:
        if key not in valid:
            similar = difflib.get_close_matches(key, valid, 1)
            hint = f"did you mean {where}.{similar[0]}?" if similar else f"it takes {', '.join(valid) or 'none'}"
            return f"{where}.{key}: {_described(target)} has no such argument; {hint}"
    return None


def check_arguments(spec: Any, trusted_modules: Iterable[str], where: str) -> None:
    """Refuse unknown classes and arguments in `spec`, nested specs included, without building anything.

    Raises ConfigError, as `build` does.
    """
    trusted = tuple(trusted_modules)
    if isinstance(spec, list):
        for index, item in enumerate(spec):
            check_arguments(item, trusted, f"{where}[{index}]")
    if not isinstance(spec, Mapping):
        return
    for key, value in spec.items():
        if key not in ("_target_", "_partial_"):
            check_arguments(value, trusted, f"{where}.{key}")
    if "_target_" in spec:
        target = resolve_target(spec["_target_"], trusted, f"{where}._target_")
        if unknown := _unknown_argument(target, [key for key in spec if key not in _RESERVED], where):
            raise ConfigError(unknown)


def build(spec: Mapping[str, Any], trusted_modules: Iterable[str], where: str, **extra: Any) -> Any:
    """Build the object that `spec["_target_"]` names, nested specs first; `extra` are further arguments.

    `where` is the key of `spec` in the config. Raises ConfigError naming `where` for everything
    that the author of the config can correct; errors of Descent's own classes pass unchanged.
    """
    trusted = tuple(trusted_modules)
    target = resolve_target(spec["_target_"], trusted, f"{where}._target_")
    kwargs = {key: _arguments(value, trusted, f"{where}.{key}") for key, value in spec.items() if key not in _RESERVED}
    kwargs.update(extra)
    given = spec.get("_args_", [])
    if not isinstance(given, list):
        raise ConfigError(f"{where}._args_={_of_type(given)}: must be a list of positional arguments")
    partial = spec.get("_partial_", False)
    if not isinstance(partial, bool):
        raise ConfigError(f"{where}._partial_={_of_type(partial)}: must be true or false")
    args = _arguments(given, trusted, f"{where}._args_")
    if partial:
        return functools.partial(target, *args, **kwargs)
    try:
        return target(*args, **kwargs)
    except DescentError:
        raise
    except TypeError as error:
        # If the arguments fit the signature, the error comes from the body of the user's code.
        inside = error.__traceback__ is not None and error.__traceback__.tb_next is not None
        if inside and _binds(target, args, kwargs):
            raise ConfigError(f"{where}: {_described(target)} failed: {in_one_line(error)}") from error
        raise ConfigError(_explain(target, kwargs, error, where)) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}: {_described(target)} failed: {in_one_line(error)}") from error


def build_function(spec: Mapping[str, Any], trusted_modules: Iterable[str], where: str, *, takes: int) -> Any:
    """What is to be called with `takes` things: the object that `spec` builds, or the function itself that it names.

    A function of the user's that can't be called with the arguments of `spec` alone, and can with `takes` more before
    them, is what is wanted, with these arguments; every other one makes it. Raises ConfigError as `build` does.
    """
    trusted = tuple(trusted_modules)
    target = resolve_target(spec["_target_"], trusted, f"{where}._target_")
    plain = "_args_" not in spec and "_partial_" not in spec
    if not inspect.isclass(target) and plain:
        kwargs = {k: _arguments(value, trusted, f"{where}.{k}") for k, value in spec.items() if k not in _RESERVED}
        itself = not _binds(target, [], kwargs) and _binds(target, list(range(takes)), kwargs)
        if itself:
            return functools.partial(target, **kwargs) if kwargs else target
    return build(spec, trusted, where)


def _binds(target: Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(target).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True
