"""What may be read as data: regular files that belong to it, not what a file system or a desktop puts beside them."""

import stat
from pathlib import Path

from descent.errors import DataError

_ARCHIVE_LEFTOVERS = "__MACOSX"
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no data: `.DS_Store`, `._cat.png`, `.ipynb_checkpoints`, `__MACOSX`."""
    return name.startswith(".") or name == _ARCHIVE_LEFTOVERS


def require_file(file: Path, remedy: str) -> None:
    """Raise DataError unless `file` is a regular file; a pipe or a device might never end.

    remedy: what to give instead, for the message.
    """
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise DataError(f"{file} doesn't exist: {remedy}") from error
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise DataError(f"{file} is {kind}, which can't be read as data: {remedy}")
