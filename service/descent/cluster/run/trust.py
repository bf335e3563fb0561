"""What a run may not decide for the person who continues it: code to trust, folders, and where secrets go.

The folder of a run can come from anybody. So its file run.json is only a record of what was typed;
whatever gives code, settings or addresses power over this machine has to be typed once more.
"""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from descent.config.overrides import parse
from descent.config.secrets import MASK
from descent.errors import ConfigError

_PASSWORDS_OF_MLFLOW = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def overrides_to_repeat(
    saved: Mapping[str, Any], typed: Sequence[str], config_dirs: Sequence[str], where: str
) -> list[str]:
    """The overrides of a run that may be used once more without being typed.

    saved: the content of its run.json. typed, config_dirs: the overrides and folders of this
    command. where: the setting that names the run, for the message, such as `resume=RUN`.

    Raises ConfigError, with the words to add to the command, if the run was made with
    trusted modules, folders of config groups, environment variables, secrets, or addresses
    that receive code or passwords, and these are not typed now.
    """
    wanted = list(_to_be_typed(saved))
    keys = {_key(override) for override in typed}
    folders = {str(Path(folder).expanduser().resolve()) for folder in config_dirs}
    missing = [override for override in wanted if _key(override) not in keys]
    untrusted = [name for name in _trusted(saved) if name not in _typed_trust(typed)]
    if untrusted:
        missing.append(f"trusted_modules=[{','.join(dict.fromkeys([*_typed_trust(typed), *untrusted]))}]")
    words = [shlex.quote(override.replace(MASK, "…")) for override in missing]
    words += [f"--config-dir {shlex.quote(str(f))}" for f in saved.get("config_dirs") or () if str(f) not in folders]
    if words:
        raise ConfigError(
            f"{where}: the run was made with settings that can run code or read and send data, and a run's folder "
            f"may come from anybody, so they must be typed again; if you know them, add: {' '.join(words)}"
        )
    again = {_key(override) for override in wanted} | {"trusted_modules"}
    return [override for override in saved["overrides"] if _key(override) not in again]


def keys_to_type(saved: Mapping[str, Any]) -> set[str]:
    """The keys that must be typed again where a run is repeated; `trusted_modules` besides. saved: its run.json."""
    return {_key(override) for override in _to_be_typed(saved)}


def refuse_untyped_trust(saved: Mapping[str, Any], trusted_modules: Sequence[str], where: str) -> None:
    """Raise ConfigError if a run trusts modules that are not in `trusted_modules`, which were typed."""
    if any(name not in trusted_modules for name in _trusted(saved)):
        names = ",".join(dict.fromkeys([*trusted_modules, *_trusted(saved)]))
        raise ConfigError(
            f"{where}: the run imports modules of its own, and a run's folder may come from anybody, so they must be "
            f"named again; if you know them, add trusted_modules=[{names}]"
        )


def _to_be_typed(saved: Mapping[str, Any]) -> Iterator[str]:
    for override in saved["overrides"]:
        key, _, value = override.partition("=")
        if _key(override) == "trusted_modules":
            continue
        calls_resolver = "${" in value and ":" in value[value.index("${") :]
        sends_passwords = (
            key == "tracking.uri" and value.startswith("http") and any(os.environ.get(n) for n in _PASSWORDS_OF_MLFLOW)
        )
        # A driver executes what the cluster at this address sends to it.
        joins_cluster = key == "ray.address" and value not in ("null", "auto", "local")
        if calls_resolver or MASK in value or sends_passwords or joins_cluster:
            yield override


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _trusted(saved: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in (saved.get("config") or {}).get("trusted_modules") or ()]


def _typed_trust(typed: Sequence[str]) -> list[str]:
    given = [override for override in typed if _key(override) == "trusted_modules"]
    value = parse(given[-1:], {})[0].value if given else []
    return [str(name) for name in value] if isinstance(value, list) else []
