"""Data sets on s3://: joins the data layer's storage protocol to the artifacts' store."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from descent.data import storage
from descent.errors import DataError, StoreError
from descent.storage import Store, open_store

Result = TypeVar("Result")


class StoreStorage:
    """A store, as data sets read it; errors speak as DataError."""

    folder: Path | None = None

    def __init__(self, store: Store) -> None:
        self._store = store
        self.uri = store.address

    def list(self) -> list[str]:
        return [entry.key for entry in _spoken(lambda: list(self._store.list()))]

    def size(self, name: str) -> int:
        size = _spoken(lambda: self._store.size(name))
        if size is None:
            raise DataError(f"{self.uri}/{name} doesn't exist")
        return size

    def version(self, name: str) -> str:
        entry = next((e for e in _spoken(lambda: list(self._store.list(name))) if e.key == name), None)
        if entry is None:
            raise DataError(f"{self.uri}/{name} doesn't exist")
        return f"{entry.size} {entry.modified}"

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        if length is None and start == 0:
            return _spoken(lambda: self._store.get(name))
        stop = self.size(name) if length is None else start + length
        return _spoken(lambda: self._store.get_range(name, start, stop))

    def fetch(self, name: str, target: Path) -> None:
        try:
            self._store.download(name, target)
        except StoreError as error:
            if error.kind == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise DataError(str(error)) from error

    def put(self, name: str, source: Path) -> None:
        _spoken(lambda: self._store.upload(source, name))


def _spoken(ask: Callable[[], Result]) -> Result:
    try:
        return ask()
    except StoreError as error:
        raise DataError(str(error)) from error


def connect() -> None:
    """Let data sets name s3:// addresses in this process."""
    storage.provide("s3", lambda uri: StoreStorage(open_store(uri)))
