"""What a store can do. A key is a relative path with `/`; an object is whole or not there."""

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
    """One object: its key, its size in bytes, when it was last written (Unix time)."""

    key: str
    size: int
    modified: float


class Store(Protocol):
    """A folder, local or on S3. Every method raises StoreError and nothing else."""

    @property
    def address(self) -> str:
        """The path or `s3://bucket/prefix` that `open_store` takes."""
        ...

    def at(self, *parts: str) -> "Store":
        """The store below this one."""
        ...

    def get(self, key: str) -> bytes:
        """An object's bytes. kind="missing" if there is none."""
        ...

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """The bytes from `start` up to, not including, `stop`; all of them or an error."""
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
        """An object into a file, which is there whole (and verified, where asked) or not at all."""
        ...

    def put(self, key: str, content: Content) -> None:
        """Write a small object in one piece, replacing what is there."""
        ...

    def put_if_absent(self, key: str, content: Content) -> bool:
        """Write a small object unless there is one; whether it was written.

        On a server without conditional writes this looks first and writes then: among
        several that race for a key more than one may be told that it won.
        """
        ...

    def upload(self, source: Path | Content, key: str, progress: Progress | None = None) -> None:
        """A large object from a file or from memory, in parallel parts; one writer per key at a time."""
        ...

    def size(self, key: str) -> int | None:
        """An object's size in bytes; None if there is none."""
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The objects whose keys begin with `prefix`, in the keys' order."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, in the given order one after the other; a key that isn't there is no error."""
        ...

    def tidy(self, prefix: str = "", older_than_s: float = 86400.0) -> int:
        """Remove what transfers that died have left half done; how many there were."""
        ...


def checked(key: str) -> str:
    """The key itself. Raises StoreError when it could name something outside of its store."""
    parts = key.split("/")
    if not key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise StoreError(f"{key!r} is no key: a relative path without '..' is one", kind="key")
    return key
