"""One process at a time trains in a run's folder."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from descent.errors import ConfigError

LOCK_FILE = "run.lock"
_OWNER_FILE = "owner.json"


class RunLock:
    """Holds a run's folder for this process until `release`; the kernel releases it when the process dies."""

    def __init__(self, run_dir: Path, key: str) -> None:
        """key: the setting that named the run, for the error.

        Raises ConfigError, with the process that holds the folder, if another one does.
        """
        self._lock = FileLock(run_dir / LOCK_FILE, thread_local=False)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(
                f"{key}: the run is being trained by {_owner(run_dir)}; wait for it, or stop it first (Ctrl-C or SIGTERM)"
            ) from None
        except OSError as error:
            raise ConfigError(f"{key}: {run_dir}: can't lock the run's folder: {error.strerror}") from error
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
            (run_dir / _OWNER_FILE).write_text(json.dumps(owner), encoding="utf-8")

    def release(self) -> None:
        """Let others have the folder; may be called again."""
        self._lock.release()


def is_locked(run_dir: Path) -> bool:
    """Whether a living process trains in this folder."""
    if not (run_dir / LOCK_FILE).exists():
        return False
    lock = FileLock(run_dir / LOCK_FILE, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def owner_host(run_dir: Path) -> str | None:
    """The host of the process that has, or last had, the folder; None where that was never noted."""
    try:
        return str(json.loads((run_dir / _OWNER_FILE).read_text(encoding="utf-8"))["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _owner(run_dir: Path) -> str:
    try:
        owner = json.loads((run_dir / _OWNER_FILE).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
