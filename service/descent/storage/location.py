"""Where something lies: a local `Path`, or an `S3Path` that has what Descent uses of a Path."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from descent.errors import StoreError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True, order=True)
class S3Path:
    """An address on S3: `S3Path("s3://bucket/runs") / "mine"`."""

    address: str

    def __truediv__(self, name: str) -> "S3Path":
        return S3Path(f"{self.address.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        return self.address.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "S3Path":
        return S3Path(self.address.rstrip("/").rpartition("/")[0])


Location = Path | S3Path
AnyLocation = TypeVar("AnyLocation", Path, S3Path, Path | S3Path)
"""For functions that give a location of the kind that they were given."""


def to_location(text: str | Location) -> Location:
    """What a user typed as a location: a local path (absolute, with `~` expanded) or an address on S3.

    Raises StoreError for an address with any other scheme.

    >>> to_location("s3://bucket/runs/")
    S3Path(address='s3://bucket/runs')
    """
    if isinstance(text, Path | S3Path):
        return text
    scheme = _SCHEME.match(text)
    if scheme is None:
        return Path(text).expanduser().resolve()
    if scheme[1] != "s3":
        rest = text[scheme.end() :].rpartition("@")[2]  # without a password
        raise StoreError(
            f"{scheme[0]}{rest}: there is no storage for {scheme[0]} here; give a local path or s3://bucket/prefix",
            kind="address",
        )
    return S3Path(text.rstrip("/"))
