"""What of a configuration must not be told: not in an error, not in a printout, not to a tracking server."""

import re
from collections.abc import Mapping
from typing import Any

_CREDENTIALS = re.compile(r"(?<=://)[^/\s@'\"]+@")
_SECRET_QUERY = re.compile(r"(?i)([?&][\w-]*(?:password|secret|token|signature|api_?key)=)[^&\s'\"]+")
_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_SECRET_WORDS = {
    "password",
    "passwd",
    "passphrase",
    "secret",
    "secrets",
    "credential",
    "credentials",
    "apikey",
}
# `target_key` names a column and `pad_token` a symbol: innocent. These come before real keys,
_KEY_OWNERS = {"api", "access", "private", "encryption", "signing", "ssh", "account", "auth"}
# and these before tokens that aren't.
_TOKEN_KINDS = {
    "pad",
    "eos",
    "bos",
    "unk",
    "mask",
    "sep",
    "cls",
    "start",
    "end",
    "stop",
    "per",
    "special",
    "each",
    "next",
    "first",
    "last",
}


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


def masked(tree: Any, key: str = "") -> Any:
    """A copy of a config's plain values with `***` for secrets and addresses without passwords.

    >>> masked({"s3": {"secret_access_key": "abc"}, "uri": "http://me:pw@host", "n": 1})
    {'s3': {'secret_access_key': '***'}, 'uri': 'http://host', 'n': 1}
    """
    if isinstance(tree, Mapping):
        return {name: masked(value, str(name)) for name, value in tree.items()}
    if is_secret(key) and tree not in (None, ""):
        return "***"
    if isinstance(tree, list):
        return [masked(value, key) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree
