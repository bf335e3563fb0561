"""Where a run came from (code, user, environment), and what of it must not be told.

Whatever goes to a tracking server passes through `redact` and `is_secret`: credentials in a
config or in an address must not end up in a database that others read.
"""

import getpass
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_CREDENTIALS = re.compile(r"(?<=://)[^/\s@'\"]+@")
_SECRET_QUERY = re.compile(
    r"(?i)([?&][\w-]*(?:password|secret|token|signature|api_?key)=)[^&\s'\"]+"
)
_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_SECRET_WORDS = {
    "password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey",
}  # fmt: skip
# `target_key` names a column and `pad_token` a symbol: innocent. These come before real keys,
_KEY_OWNERS = {"api", "access", "private", "encryption", "signing", "ssh", "account", "auth"}
# and these before tokens that aren't.
_TOKEN_KINDS = {
    "pad", "eos", "bos", "unk", "mask", "sep", "cls", "start", "end", "stop", "per", "special",
    "each", "next", "first", "last",
}  # fmt: skip


def redact(text: str) -> str:
    """`text` without the user:password@ of any address in it, and without secret query values.

    >>> redact("postgresql://me:hunter2@db:5432/mlflow refused")
    'postgresql://db:5432/mlflow refused'
    """
    return _SECRET_QUERY.sub(r"\1***", _CREDENTIALS.sub("", text))


def is_secret(key: str) -> bool:
    """Whether a setting of this (dotted) name holds a secret.

    >>> [is_secret(k) for k in ("s3.secret_access_key", "hf_token", "authToken", "data.password")]
    [True, True, True, True]
    >>> [is_secret(k) for k in ("data.inputs_key", "model.tokens", "pad_token", "key")]
    [False, False, False, False]
    """
    words = [word.lower() for word in _WORDS.findall(key.rsplit(".", 1)[-1])]
    if not words:
        return False
    if _SECRET_WORDS & set(words):
        return True
    before = words[-2] if len(words) > 1 else ""
    if words[-1] in ("key", "keys"):
        return before in _KEY_OWNERS
    return words[-1] == "token" and before not in _TOKEN_KINDS


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
        f"{dist.metadata['Name']}=={dist.version}"
        for dist in metadata.distributions()
        if dist.metadata["Name"]
    }
    return "\n".join([f"# Python {sys.version.split()[0]}", *sorted(installed, key=str.lower), ""])


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
