"""Whether a data set is still what it was: its identity in plain values, and its files while a run reads them."""

import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from descent.data.base import Data, root_of
from descent.data.map_style import UserData
from descent.errors import DataError

_SHOWN = 8  # class names in a message
_WATCHED = 64  # files
_EVERY_S = 5.0


def identity_of(data: Data) -> dict[str, Any]:
    """Plain values that tell whether another data set has the same samples and the same classes.

    The digest of a user's class is None unless PYTHONHASHSEED=0 was set when the process started.
    """
    names = None if data.class_names is None else list(data.class_names)
    # Where texts are hashed by chance, a user's class that takes them from a set has another order in each process.
    comparable = sys.flags.hash_randomization == 0 or not isinstance(root_of(data), UserData)
    return {"digest": data.digest if comparable else None, "num_samples": len(data), "class_names": names}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """In what two identities differ, in words; None where they don't."""
    if before.get("class_names") != now.get("class_names"):
        return f"its classes are {_listed(now.get('class_names'))}, they were {_listed(before.get('class_names'))}"
    if before.get("num_samples") != now.get("num_samples"):
        return f"it has {now.get('num_samples'):,} samples, it had {before.get('num_samples'):,}"
    if None not in (before.get("digest"), now.get("digest")) and before.get("digest") != now.get("digest"):
        return f"its samples differ (digest {now.get('digest')}, it was {before.get('digest')})"
    return None


def _listed(names: Any) -> str:
    if not names:
        return "not named"
    return ", ".join(map(str, names[:_SHOWN])) + (f" … ({len(names)})" if len(names) > _SHOWN else "")


def require_digest(data: Data, digest: str | None, where: str) -> None:
    """Raise DataError where the data set isn't the one with this digest; None is any.

    A worker that joins a run later builds its own data set: its files may have changed since the run began.
    """
    if digest is not None and data.digest != digest:
        raise DataError(
            f"{where}: {data.source} has changed since the run began (digest {data.digest}, it was {digest}): "
            "put the files back as they were and resume the run, or start a new one"
        )


class FileWatch:
    """The sizes and times of change of files that are read while a run trains."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._seen = {file: _stamp(file) for file in list(files)[:_WATCHED]}
        self._next = time.monotonic() + _EVERY_S

    def refuse_changed(self) -> None:
        """Raise DataError where a file has changed or is gone; looks every few seconds only."""
        if not self._seen or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVERY_S
        for file, before in self._seen.items():
            if (now := _stamp(file)) != before:
                what = "is gone" if now is None else "has changed"
                raise DataError(
                    f"{file} {what} while the run was reading it: put it back as it was and resume the run from its last "
                    "checkpoint, or start a new run"
                )


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
