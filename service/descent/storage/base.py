"""What a store can do. A key is a relative path with `/`; an object is there with all its bytes or not at all."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from descent.errors import StoreError

Progress = Callable[[int], None]
"""Called, from any thread, with the number of bytes that have just been moved."""
Content = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Entry:
    """One object: its key, its size in bytes, when it was last written (Unix time in seconds)."""

    key: str
    size: int
    modified: float
    version: str
    """Changes when the object is written again: its ETag, or on disk its time of change in nanoseconds."""


class Store(Protocol):
    """A folder of objects, on this machine or on S3. Every method raises StoreError and nothing else."""

    @property
    def address(self) -> str:
        """The path or `s3://bucket/prefix` that `open_store` opens this store by."""
        ...

    @property
    def folder(self) -> Path | None:
        """The local folder whose files can be read in place; None for a store on S3."""
        ...

    def at(self, *parts: str) -> "Store":
        """The store in a folder below this one."""
        ...

    def get(self, key: str) -> bytes:
        """An object's bytes. kind="missing" if there is no such object."""
        ...

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """The bytes from `start` up to, not including, `stop`; an error if the object ends before `stop`."""
        ...

    def read(self, key: str, size: int, progress: Progress | None = None) -> bytearray:
        """A large object of a known size into memory, in parallel where that is faster."""
        ...

    def download(
        self,
        key: str,
        target: Path,
        *,
        size: int | None = None,
        sha256: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Copy an object to a local file, which appears with all its bytes or not at all.

        size, sha256: what the object must have; kind="damaged" if it has another.
        """
        ...

    def put(self, key: str, content: Content) -> None:
        """Write a small object in one piece, replacing the object of that key."""
        ...

    def put_if_absent(self, key: str, content: Content) -> bool:
        """Write a small object unless the key has one; returns whether this call wrote it.

        A server without conditional writes is asked first and written to then: of several
        writers that race for one key, more than one may get True.
        """
        ...

    def upload(self, source: Path | Content, key: str, progress: Progress | None = None) -> None:
        """Write a large object from a file or from memory, in parallel parts; one writer per key at a time."""
        ...

    def find(self, key: str) -> Entry | None:
        """An object's size and times; None if there is no such object."""
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The objects whose keys begin with `prefix`, in the order of their keys."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects one after the other, in the given order; a key without an object is no error."""
        ...

    def tidy(self, prefix: str = "", older_than_s: float = 86400.0) -> int:
        """Remove the remains of transfers whose process died; returns how many there were."""
        ...


def is_key(text: str) -> bool:
    """Whether a text is a relative path that stays inside of its store."""
    return bool(text) and "\0" not in text and not any(part in ("", ".", "..") for part in text.split("/"))


def checked(key: str) -> str:
    """The key itself. Raises StoreError when it could name something outside of its store."""
    if not is_key(key):
        raise StoreError(f"{key!r} is no key: a relative path without '..' is one", kind="key")
    return key
