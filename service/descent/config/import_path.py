"""Where Python looks for the user's own modules: in the current folder, but behind all installed ones.

With the current folder first, a file in it with the name of a library's module (`queue.py`,
`statistics.py`) would be executed in place of that module as soon as any library imports it.
"""

import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from descent.errors import ConfigError


def append_current_folder() -> None:
    """Make the current folder the last entry of `sys.path`; an entry of PYTHONPATH stays in its place."""
    current = str(Path.cwd())
    from_environment = {os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p}
    kept = [p for p in sys.path if os.path.abspath(p or ".") != current or (p and current in from_environment)]
    sys.path[:] = kept if current in from_environment and current in map(os.path.abspath, kept) else [*kept, current]


def use_import_paths(paths: Sequence[str]) -> None:
    """Give a worker the import paths of the driver: entries of PYTHONPATH, and last the driver's current folder.

    The entries of PYTHONPATH come first, as in the driver. Ray puts the driver's current folder
    first in a worker; here it is moved behind all other entries.
    """
    *from_environment, current = paths
    if current not in from_environment:
        sys.path[:] = [*(p for p in sys.path if os.path.abspath(p or ".") != current), current]
    for path in reversed(from_environment):
        if path not in sys.path:
            sys.path.insert(0, path)


def refuse_shadowed(name: str, where: str) -> None:
    """Raise ConfigError if the current folder has a module `name` that an installed one hides.

    `name` is the first part of a trusted module, `where` the key in the config that names it.
    """
    current = Path.cwd()
    own = [file for file in (current / f"{name}.py", current / name) if file.exists()]
    if not own or (own[0].is_dir() and not any(own[0].glob("*.py"))):
        return
    if name in sys.builtin_module_names:
        raise ConfigError(_hidden(own[0], "a module of Python", where))
    found = importlib.machinery.PathFinder.find_spec(name)
    if found is None:
        return
    places = [Path(p) for p in (found.origin, *(found.submodule_search_locations or ())) if p]
    if places and not any(place.resolve().is_relative_to(current.resolve()) for place in places):
        raise ConfigError(_hidden(own[0], str(places[0]), where))


def _hidden(own: Path, installed: str, where: str) -> str:
    return (
        f"{where}: {own.name} in this folder has the name of an installed module ({installed}), "
        f"and Python imports the installed one; rename yours"
    )
