"""Where a data set's files lie: a folder, or whatever a scheme such as s3:// stands for.

Data sets know only the `Storage` protocol. Local folders are here; what talks to a network
comes from above (`provide`), since the layers keep data and artifacts apart.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from descent.errors import DataError


class Storage(Protocol):
    """Files under one place, named by their path relative to it, with forward slashes.

    Every method raises DataError, naming the file, when something is missing or can't be read.
    """

    @property
    def uri(self) -> str: ...

    @property
    def folder(self) -> Path | None:
        """The local folder, where there is one: its files are read in place."""
        ...

    def list(self) -> list[str]:
        """All files, sorted."""
        ...

    def size(self, name: str) -> int:
        """Bytes of one file."""
        ...

    def version(self, name: str) -> str:
        """Changes when the file does: its time of change, or its ETag."""
        ...

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """A range of one file; to its end without `length`."""
        ...

    def fetch(self, name: str, target: Path) -> None:
        """Copy one file to `target`, which may exist. Raises OSError where that can't be written."""
        ...

    def put(self, name: str, source: Path) -> None:
        """Copy a local file to here; whole or not at all."""
        ...


_openers: dict[str, Callable[[str], Storage]] = {}


def provide(scheme: str, opener: Callable[[str], Storage]) -> None:
    """Open what begins with `scheme`:// by `opener`, which is given the whole address."""
    _openers[scheme] = opener


def is_remote(uri: str) -> bool:
    """Whether `uri` is an address with a scheme, not a path."""
    return "://" in uri


def open_storage(uri: str) -> Storage:
    """The storage at a folder's path or an address. Raises DataError for an unknown scheme."""
    if not is_remote(uri):
        return LocalFolder(Path(uri).expanduser())
    scheme = uri.split("://")[0]
    if scheme not in _openers:
        known = ", ".join(f"{name}://" for name in sorted(_openers)) or "none"
        raise DataError(f"data.path={uri}: no storage for {scheme}:// here; there is: {known}")
    return _openers[scheme](uri.rstrip("/"))


def split_file(uri: str) -> tuple[str, str]:
    """The place and the name of one file.

    >>> split_file("s3://bucket/sets/a.npy"), split_file("a.npy")
    (('s3://bucket/sets', 'a.npy'), ('.', 'a.npy'))
    """
    place, _, name = uri.rpartition("/")
    return place or ("/" if uri.startswith("/") else "."), name


class LocalFolder:
    """A folder of this machine, or one that all nodes mount."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path | None = folder
        self._folder = folder
        self.uri = str(folder)

    def list(self) -> list[str]:
        found = (p for p in self._folder.rglob("*") if p.is_file())
        return sorted(p.relative_to(self._folder).as_posix() for p in found)

    def _file(self, name: str) -> Path:
        file = self._folder / name
        if not file.is_file():
            raise DataError(f"{file} doesn't exist")
        return file

    def size(self, name: str) -> int:
        return self._file(name).stat().st_size

    def version(self, name: str) -> str:
        return str(self._file(name).stat().st_mtime_ns)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        try:
            with self._file(name).open("rb") as file:
                file.seek(start)
                return file.read(-1 if length is None else length)
        except OSError as error:
            raise DataError(f"{self._folder / name} can't be read: {error}") from error

    def fetch(self, name: str, target: Path) -> None:
        shutil.copyfile(self._file(name), target)

    def put(self, name: str, source: Path) -> None:
        target = self._folder / name
        part = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, part)
            part.replace(target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise DataError(f"{target} can't be written: {error}") from error
