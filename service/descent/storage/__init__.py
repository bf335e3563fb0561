"""One small interface over local folders and `s3://bucket/prefix`: `open_store(address)`.

`base` says what a store can do, `local` and `s3` do it, `s3_errors` puts what boto3 raises
into one line that a user can act on. boto3 is imported nowhere else, and only once an
`s3://` address is opened.
"""

from pathlib import Path

from descent.storage.base import Entry as Entry
from descent.storage.base import Progress as Progress
from descent.storage.base import Store as Store
from descent.storage.local import LocalStore as LocalStore


def is_s3(address: str | Path) -> bool:
    """Whether an address names objects on S3; anything else is a path."""
    return isinstance(address, str) and address.startswith("s3://")


def open_store(address: str | Path) -> Store:
    """The store at a path or at `s3://bucket/prefix`; nothing is asked of a server yet.

    Credentials, region and endpoint come from where AWS's own tools take them: the
    environment (AWS_PROFILE, AWS_ACCESS_KEY_ID …, AWS_ENDPOINT_URL_S3), ~/.aws, a role.

    Raises StoreError for an address that can't be one, or a profile that doesn't exist.
    """
    if is_s3(address):
        from descent.storage.s3 import S3Store

        return S3Store.of(str(address))
    return LocalStore(Path(address).expanduser().resolve())
