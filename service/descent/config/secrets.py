"""Finds secrets and takes them out of all that is shown or kept: errors, printouts, files, tracking.

A value is a secret by its name (`db_password`, `OPENAI_KEY`), by its place in an address
(`user:password@host`, `?sig=…`), or by its origin: everything that a config reads from the
environment (`${oc.env:NAME}`) is shown as the name of the variable, never as its value.
"""

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

MASK = "***"

_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])")
_SECRET_WORDS = {
    *("password", "passwords", "passwd", "passphrase", "passcode", "pwd", "pw", "secret", "secrets"),
    *("credential", "credentials", "creds", "apikey", "apikeys", "authorization", "bearer", "jwt", "dsn"),
}
"""A name that holds one of these words is that of a secret."""
_LAST_WORDS = {"pass", "pat", "auth", "sas", "cookie", "cookies", "sig", "signature"}
"""A name that ends with one of these words is that of a secret."""
_PARTS = re.compile(r"password|passwd|passphrase|secret|credential|apikey|privatekey|accesskey")
"""The same for names without a boundary between their words, such as PGPASSWORD."""
_HARMLESS_PASSES = {
    "forward",
    "backward",
    "single",
    "multi",
    "one",
    "two",
    "first",
    "second",
    "low",
    "high",
    "band",
    "by",
}
_HARMLESS_KEYS = {
    *("input", "inputs", "target", "targets", "feature", "features", "label", "labels", "image", "images", "text"),
    *("column", "row", "sort", "group", "primary", "foreign", "index", "id", "name", "class", "sample", "batch"),
    *("data", "state", "metric", "query", "value", "dict", "cache", "json", "partition", "shuffle", "public", "mask"),
    "init",
}
"""`target_key` names a column; `openai_key` is a secret."""
_HARMLESS_TOKENS = {
    *("pad", "eos", "bos", "unk", "mask", "sep", "cls", "start", "end", "stop", "per", "special", "each", "next"),
    *("first", "last", "image", "class", "max", "min", "num", "new", "separator", "unknown", "padding"),
}
"""`pad_token` is a symbol of a vocabulary; `hf_token` is a secret."""
_HARMLESS_NAMES = {"PWD", "OLDPWD"}
"""The shell's current and former folder."""


@functools.lru_cache(4096)
def is_secret(key: str) -> bool:
    """Whether a setting or an environment variable of this (dotted) name holds a secret.

    >>> [is_secret(k) for k in ("s3.secret_access_key", "hf_token", "authToken", "PGPASSWORD", "passwords.db")]
    [True, True, True, True, True]
    >>> [is_secret(k) for k in ("MYSQL_PWD", "DB_PASS", "OPENAI_KEY", "GITHUB_PAT", "headers.Authorization")]
    [True, True, True, True, True]
    >>> [is_secret(k) for k in ("data.inputs_key", "model.tokens", "pad_token", "key", "PWD", "low_pass")]
    [False, False, False, False, False, False]
    """
    return any(_is_secret_name(part) for part in key.split("."))


def _is_secret_name(name: str) -> bool:
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words or name in _HARMLESS_NAMES:
        return False
    if name.isupper() and len(name) > 4 and name.endswith(("PASS", "PWD", "KEY")) and "_" not in name:
        return True
    if _SECRET_WORDS & set(words) or _PARTS.search("".join(words)) or "connection string" in " ".join(words):
        return True
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last in ("key", "keys"):
        return before != "" and before not in _HARMLESS_KEYS
    if last == "token" or (last == "tokens" and before in ("access", "auth", "api", "refresh")):
        return before not in _HARMLESS_TOKENS
    if last == "pass":
        return before not in _HARMLESS_PASSES
    return last in _LAST_WORDS


# -- values ------------------------------------------------------------------------------------

_hidden: dict[str, str] = {}
"""Value that a config has read from the environment -> the text that is shown instead."""
_SHORTEST = 4
"""Shorter values are not searched in free text: they are parts of ordinary words."""
_DISTINCT = 8
"""Values from this length on are replaced within words, too."""
_ORDINARY = {"true", "false", "null", "none", "auto", "cuda", "full", "fast", "exact", "epoch", "train", "data"}


def hide(value: str, shown: str = MASK) -> None:
    """Replace `value` by `shown` in everything that passes through `redact` from now on."""
    if len(value) >= _SHORTEST and value.lower() not in _ORDINARY and not (value.isdigit() and len(value) < _DISTINCT):
        _hidden[value] = shown


def _hidden_values() -> Iterator[tuple[str, str]]:
    """(value, text shown instead) of what was hidden and of secrets in this process's environment."""
    yield from _hidden.items()
    for name, value in list(os.environ.items()):
        if value not in _hidden and len(value) >= _DISTINCT and is_secret(name) and not os.path.exists(value):
            yield value, MASK


def _without_values(text: str) -> str:
    for value, shown in sorted(_hidden_values(), key=lambda pair: -len(pair[0])):
        # The value as it is, and as JSON, Python and addresses write it.
        for form in dict.fromkeys(
            (value, json.dumps(value)[1:-1], repr(value)[1:-1], quote(value, ""), quote_plus(value))
        ):
            if form not in text:
                continue
            if len(form) >= _DISTINCT:
                text = text.replace(form, shown)
            else:
                text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", shown.replace("\\", r"\\"), text)
    return text


# -- text --------------------------------------------------------------------------------------

# A password may hold a slash, so all up to the last @ of an address with user:password goes.
_USER_AND_PASSWORD = re.compile(r"(?<=://)[^/\s:@'\"]*:[^\s'\"]*@")
_USER = re.compile(r"(?<=://)[^/\s@'\"]+@")
_QUERY = re.compile(r"([?&;])([\w.\-]+)=([^&;\s'\"]*)")
_SETTING = re.compile(
    r"""(?<![\w.\-?&;])(?P<name>[A-Za-z][\w.\-]*)(?P<sign>\s*=\s*|:\s+|['"]\s*:\s*)"""
    r"""(?:(?P<quote>["'])(?:(?!(?P=quote)).)*(?P=quote)|(?:[^\s'",;&]|,(?=\S))+)"""
)
"""`password=…`, `password: …` and `"password": "…"`."""
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w+/=.\-~]{8,}")
_QUERY_NAMES = {"key", "sig", "code", "x-amz-credential", "awsaccesskeyid"}
_DEFAULT = re.compile(r"(\$\{oc\.env:[^,{}]+),(?!\s*null\s*\})[^{}]*\}")


def redact(text: str) -> str:
    """`text` without secrets: passwords in addresses, secret settings, and values from the environment.

    >>> redact("postgresql://me:hunter2@db:5432/mlflow refused")
    'postgresql://db:5432/mlflow refused'
    >>> redact("http://me:a/b@host/x?sig=abc&page=2, password=hunter2")
    'http://host/x?sig=***&page=2, password=***'
    """
    text = without_passwords(_without_values(text))
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _SETTING.sub(_setting_without_value, text)
    return _DEFAULT.sub(rf"\1,{MASK}}}", text)


def without_passwords(text: str) -> str:
    """`text` without the passwords in addresses only; the addresses can still be opened.

    >>> without_passwords("http://me:hunter2@host:5000/x?page=1&token=abc")
    'http://host:5000/x?page=1&token=***'
    """
    text = _USER.sub("", _USER_AND_PASSWORD.sub("", text))
    return _QUERY.sub(lambda m: f"{m[1]}{m[2]}={MASK if _secret_query(m[2]) else m[3]}", text)


def _setting_without_value(match: re.Match[str]) -> str:
    mark = match["quote"] or ""
    return f"{match['name']}{match['sign']}{mark}{MASK}{mark}" if is_secret(match["name"]) else match[0]


def _secret_query(name: str) -> bool:
    return name.lower() in _QUERY_NAMES or is_secret(name)


def masked(tree: Any, key: str = "") -> Any:
    """A copy of a config's plain values with `***` for secrets and addresses without passwords.

    >>> masked({"s3": {"secret_access_key": "abc"}, "uri": "http://me:pw@host", "n": 1})
    {'s3': {'secret_access_key': '***'}, 'uri': 'http://host', 'n': 1}
    """
    if isinstance(tree, Mapping):
        return {name: masked(value, f"{key}.{name}" if key else str(name)) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [masked(value, key) for value in tree]
    if is_secret(key):
        # A reference names where the secret is, and is no secret itself.
        return tree if tree in (None, "") or _is_reference(tree) else MASK
    return redact(tree) if isinstance(tree, str) else tree


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\$\{oc\.env:[^,{}]+\}", value) is not None
