"""Where checkpoints lie: a `Path`, or an `Address` on S3 that is used like one."""

from dataclasses import dataclass
from pathlib import Path

from descent.storage import LocalStore, Store, is_s3, open_store


@dataclass(frozen=True, order=True)
class Address:
    """A folder on S3: `Address("s3://bucket/runs") / "mine"`."""

    text: str

    def __truediv__(self, name: str) -> "Address":
        return Address(f"{self.text.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.text

    @property
    def name(self) -> str:
        return self.text.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "Address":
        return Address(self.text.rstrip("/").rpartition("/")[0])


Location = Path | Address


def place(text: str | Location) -> Location:
    """A path, with `~` expanded, or an address on S3."""
    if isinstance(text, Path | Address):
        return text
    return Address(text.rstrip("/")) if is_s3(text) else Path(text).expanduser().resolve()


def store_at(where: Location) -> Store:
    """The store of a place."""
    return LocalStore(where) if isinstance(where, Path) else open_store(where.text)
