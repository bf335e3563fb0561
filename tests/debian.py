"""Debian packages that a test needs and a fresh machine lacks; and whether a command went well."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_ONCE = ("-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=20")
_PATIENCE_S = 240.0


def install(*packages: str) -> bool:
    """Install packages, as root where there is apt; whether it went well.

    One process at a time: tests run side by side, and apt refuses a second one.
    """
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return False
    install = ("apt-get", *_ONCE, "install", "-y", "--no-install-recommends", *packages)
    with (Path(tempfile.gettempdir()) / "descent-tests-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return went_well(*install) or (went_well("apt-get", *_ONCE, "update") and went_well(*install))


def went_well(*command: str) -> bool:
    """Whether a command did; one that hangs for want of a network does not."""
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(command, capture_output=True, env=quiet, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
