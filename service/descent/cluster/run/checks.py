"""What is looked at before anything starts: places that can be written to, a tracking server that answers."""

import os
import urllib.error
import urllib.request
from pathlib import Path

from descent.errors import ConfigError, StoreError, TrackingError
from descent.storage import open_store, to_location


def check_writable(folder: Path, key: str) -> None:
    """Create `folder` and write a file in it. Raises ConfigError naming the key."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{key}={folder}: can't write there: {error.strerror}; choose another folder") from error


def check_place(text: str, key: str) -> None:
    """Write and delete a small file in a folder or on S3. Raises ConfigError naming the key."""
    where = to_location(text)
    if isinstance(where, Path):
        return check_writable(where, key)
    name = f".probe-{os.urandom(6).hex()}"
    try:
        store = open_store(where)
        store.put(name, b"x")
        store.delete([name])
    except StoreError as error:
        raise ConfigError(f"{key}={text}: {error}") from error


def check_tracking(uri: str | None) -> None:
    """Whether an http tracking server answers at all; the run itself is opened later. Raises TrackingError."""
    if uri is None or not uri.startswith("http"):
        return
    from descent.tracking.provenance import redact

    shown = redact(uri)
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=5):
            pass
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in, opening the run will show
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrackingError(
            f"tracking.uri={shown}: no answer ({reason}); start it, or use tracking.uri=null for the embedded store"
        ) from error
