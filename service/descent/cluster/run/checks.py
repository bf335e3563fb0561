"""Whether the places that a run writes to can be written to, tried before anything starts."""

import os
from pathlib import Path

from descent.errors import ConfigError, StoreError
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
