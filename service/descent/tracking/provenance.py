"""Where a run came from (code, user, environment), without the secrets in it.

Whatever goes to a tracking server passes through `redact` and `is_secret`: credentials in a
config or in an address must not end up in a database that others read.
"""

import getpass
import json
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from descent.config.secrets import is_secret as is_secret
from descent.config.secrets import redact as redact


def flatten_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Flat params as strings for the tracking server: secrets as ***, containers as JSON."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        if is_secret(key) and value not in (None, ""):
            flat[key] = "***"
        elif isinstance(value, str):
            flat[key] = redact(value)
        elif isinstance(value, Mapping | list | tuple) or value is None or isinstance(value, bool):
            flat[key] = redact(json.dumps(value, default=str))
        else:
            flat[key] = redact(str(value))
    return flat


def code_tags() -> dict[str, str]:
    """MLflow's tags for what ran: the command, the user and, in a work tree, the commit."""
    tags = {"mlflow.source.name": Path(sys.argv[0]).name or "python", "mlflow.source.type": "LOCAL"}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        tags["mlflow.user"] = "unknown"
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["descent.git_dirty"] = str(bool(_git("status", "--porcelain", "-uno"))).lower()
    return tags


def environment() -> str:
    """The interpreter and every installed distribution with its version, one a line."""
    installed = {
        f"{dist.metadata['Name']}=={dist.version}" for dist in metadata.distributions() if dist.metadata["Name"]
    }
    return "\n".join([f"# Python {sys.version.split()[0]}", *sorted(installed, key=str.lower), ""])


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
