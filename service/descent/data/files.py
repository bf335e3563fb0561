"""Opens the store of a data set's files; an error of the store becomes a DataError with the same words."""

import contextlib
from collections.abc import Iterator

from descent.errors import DataError, StoreError
from descent.storage import Entry, Location, Store, open_store


@contextlib.contextmanager
def data_errors() -> Iterator[None]:
    """Raise a StoreError of the block (or of the function that this decorates) as a DataError with the same words."""
    try:
        yield
    except StoreError as error:
        raise DataError(str(error)) from error


def is_remote(text: str) -> bool:
    """Whether a text is an address with a scheme, not a local path."""
    return "://" in text


@data_errors()
def open_data(address: str | Location) -> Store:
    """The store at a folder's path or an `s3://` address. Raises DataError for any other scheme."""
    return open_store(address)


def find_file(store: Store, key: str) -> Entry:
    """Size and version of one file. Raises DataError naming the file if there is none."""
    with data_errors():
        entry = store.find(key)
    if entry is None:
        raise DataError(f"{store.address}/{key} doesn't exist")
    return entry
