"""One small interface over local folders and `s3://bucket/prefix`: `open_store(location)`.

`location` says where something lies, `base` what a store can do; `local` and `s3` are the two
stores; `s3_errors` turns what boto3 raises into one line that a user can act on; `atomic`
writes small files in one piece. boto3 is imported nowhere else, and only once a location on
S3 is opened.
"""

from pathlib import Path

from descent.storage.base import Entry as Entry
from descent.storage.base import Progress as Progress
from descent.storage.base import Store as Store
from descent.storage.local import LocalStore as LocalStore
from descent.storage.location import Location as Location
from descent.storage.location import S3Path as S3Path
from descent.storage.location import to_location as to_location


def open_store(where: str | Location) -> Store:
    """The store at a local path or an address on S3; nothing is asked of a server yet.

    Credentials, region and endpoint come from where AWS's own tools take them: the
    environment (AWS_PROFILE, AWS_ACCESS_KEY_ID …, AWS_ENDPOINT_URL_S3), ~/.aws, a role.

    Raises StoreError for what can't be an address, or a profile that doesn't exist.
    """
    location = to_location(where)
    if isinstance(location, Path):
        return LocalStore(location)
    from descent.storage.s3 import S3Store

    return S3Store.of(location.address)
