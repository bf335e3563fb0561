"""Files that appear whole or not at all: written under a temporary name beside the target, then renamed."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"
"""What the name of a file ends with that is still being written, or whose writer died."""
PRIVATE = 0o600
"""The mode of a file that may hold what a user typed: readable by its owner only."""


@contextlib.contextmanager
def replacing(path: Path, *, mode: int = 0o666, durable: bool = True, replace: bool = True) -> Iterator[int]:
    """Give the block a descriptor to write to; when the block ends, the file is at `path` with all its content.

    An exception in the block leaves `path` as it was. Missing folders are made.
    mode: the file's permissions, of which the process's umask is taken away.
    durable: sync the content and the folder's entry to the disk, so that the file survives a loss of power.
    replace: False raises FileExistsError if there is a file at `path` already.

    Raises OSError when the disk refuses.
    """
    with temporary_beside(path) as temporary:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            yield descriptor
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # unlike a rename, this fails where there is a file already
        if durable:
            sync(path.parent)


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A free name for a temporary file in the folder of `path`; a file of that name is deleted when the block ends.

    For writers that take a name, not a descriptor: at the end of the block, rename the file to `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{PARTIAL}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes, *, mode: int = 0o666, durable: bool = True) -> None:
    """Replace a small file by `content` (text as UTF-8) in one piece; see `replacing`."""
    remaining = memoryview(content.encode() if isinstance(content, str) else content)
    with replacing(path, mode=mode, durable=durable) as descriptor:
        while remaining.nbytes:
            remaining = remaining[os.write(descriptor, remaining) :]


def sync(path: Path) -> None:
    """Return once a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
