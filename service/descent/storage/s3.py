"""`s3://bucket/prefix` as a store, by boto3 and its transfer manager.

Every upload carries a random number in its metadata: when the reply to its last request
is lost, that number shows whether the object that is there now is the one that was sent.
"""

import contextlib
import hashlib
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import botocore.exceptions as aws
import tenacity

from descent.errors import StoreError
from descent.storage.atomic import temporary_beside
from descent.storage.base import Content, Entry, Progress, checked, is_key
from descent.storage.local import explaining
from descent.storage.s3_client import MAX_TRIES, Server, View
from descent.storage.s3_errors import FAILURES, code_of, explain

_ADDRESS = re.compile(r"^s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?$")
_WRITER = "descent-writer"


class S3Store:
    """See `base.Store`."""

    def __init__(self, server: Server, bucket: str, prefix: str) -> None:
        self._server, self.bucket, self.prefix = server, bucket, prefix

    @property
    def _client(self) -> Any:
        return self._server.client

    @classmethod
    def of(cls, address: str) -> "S3Store":
        """The store at `s3://bucket/prefix`. Raises StoreError for what can't be an address."""
        found = _ADDRESS.match(address)
        if found is None:
            raise StoreError(
                f"{address.split('@')[-1]}: is not s3://bucket/prefix (a bucket's name has 3 to 63 small letters, "
                "digits, '-' and '.'; credentials belong into the environment or ~/.aws)",
                kind="address",
            )
        prefix = (found[2] or "").strip("/")
        if prefix:
            checked(prefix)
        try:
            return cls(Server.open(), found[1], prefix)
        except FAILURES as error:
            raise explain(error, "open the store", address, "S3") from error

    @property
    def address(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def folder(self) -> Path | None:
        return None

    def at(self, *parts: str) -> "S3Store":
        below = [self.prefix, *(checked(p) for p in parts)]
        return S3Store(self._server, self.bucket, "/".join(p for p in below if p))

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{checked(key)}" if self.prefix else checked(key)

    def _where(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._key(key)}

    @contextlib.contextmanager
    def _asking(self, what: str, key: str = "") -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            address = f"{self.address}/{key}" if key else self.address
            raise explain(error, what, address, self._server.endpoint) from error

    # -- reading ----------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        with self._asking("read", key):
            return self._get(**self._where(key))

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        span = f"bytes={start}-{stop - 1}"
        with self._asking("read", key):
            found = self._get(**self._where(key), Range=span)
        if len(found) != stop - start:
            raise StoreError(f"{self.address}/{key}: ends before byte {stop}", kind="damaged")
        return found

    def _get(self, **request: Any) -> bytes:
        """One request for an object, and its whole body: botocore repeats the former only, so a cut body starts both again."""

        def whole() -> bytes:
            return bytes(self._client.get_object(**request)["Body"].read())

        return _retrying(_BODY_CUT)(lambda: self._server.attempt(whole))

    def read(self, key: str, size: int, progress: Progress | None = None) -> bytearray:
        actual = self._head(key, "read")["ContentLength"]
        if actual != size:
            raise StoreError(f"{self.address}/{key}: {actual} bytes instead of {size}", kind="damaged")
        found = bytearray(size)
        if size:
            with self._asking("read", key):
                self._download(key, lambda: View(found), progress)
        return found

    def download(
        self,
        key: str,
        target: Path,
        *,
        size: int | None = None,
        sha256: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        with explaining(target), temporary_beside(target) as temporary:
            with self._asking("download", key):
                self._download(key, lambda: str(temporary), progress)
            _verify(temporary, f"{self.address}/{key}", size, sha256)
            temporary.replace(target)

    def _download(self, key: str, target: Callable[[], Any], progress: Progress | None) -> None:
        def transfer() -> None:
            with self._server.transfers() as manager:
                manager.download(self.bucket, self._key(key), target(), subscribers=_subscribers(progress)).result()

        self._server.attempt(transfer)

    def _head(self, key: str, what: str) -> dict[str, Any]:
        with self._asking(what, key):
            answer: dict[str, Any] = self._client.head_object(**self._where(key))
            return answer

    def find(self, key: str) -> Entry | None:
        try:
            found = self._head(key, "look at")
        except StoreError as error:
            if error.kind == "missing":
                return None
            raise
        return Entry(key, int(found["ContentLength"]), found["LastModified"].timestamp(), str(found["ETag"]))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        base = f"{self.prefix}/" if self.prefix else ""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=base + prefix)
        with self._asking("list"):
            for page in pages:
                for found in page.get("Contents", ()):
                    key = found["Key"].removeprefix(base)
                    if is_key(key):  # others, such as the mark of an empty folder, are nobody's objects here
                        yield Entry(key, found["Size"], found["LastModified"].timestamp(), str(found["ETag"]))

    # -- writing ----------------------------------------------------------------------

    def put(self, key: str, content: Content) -> None:
        with self._asking("write", key):
            self._put(**self._where(key), Body=bytes(content))

    def _put(self, **request: Any) -> None:
        self._server.attempt(lambda: self._client.put_object(**request, **self._server.extra_arguments()))

    def put_if_absent(self, key: str, content: Content) -> bool:
        writer = secrets.token_hex(8)
        given = {**self._where(key), "Body": bytes(content), "Metadata": {_WRITER: writer}}
        if not self._server.conditional(self.bucket, self._key(".descent-probe")):
            if self.find(key) is not None:
                return False
            with self._asking("write", key):
                self._put(**given)
            return self._is_ours(key, writer, len(content))
        with self._asking("write", key):
            try:
                _retrying(_KEY_BUSY)(lambda: self._put(**given, IfNoneMatch="*"))
                return True
            except FAILURES as error:
                if code_of(error) == "ConditionalRequestConflict":
                    return False
                if code_of(error) not in ("PreconditionFailed", "412"):
                    raise
                # The object may be this call's own: written by a request whose reply was lost.
                return self._is_ours(key, writer, len(content))

    def upload(self, source: Path | Content, key: str, progress: Progress | None = None) -> None:
        writer = secrets.token_hex(8)
        size = source.stat().st_size if isinstance(source, Path) else memoryview(source).nbytes

        def transfer() -> None:
            with self._server.transfers() as manager:
                manager.upload(
                    str(source) if isinstance(source, Path) else View(source),
                    self.bucket,
                    self._key(key),
                    subscribers=_subscribers(progress),
                    extra_args={"Metadata": {_WRITER: writer}, **self._server.extra_arguments()},
                ).result()

        self._server.left_over(self._key(key), 0)  # forget what earlier failures left on the record
        try:
            self._server.attempt(transfer)
        except FAILURES as error:
            landed = False
            with contextlib.suppress(StoreError):
                landed = self._is_ours(key, writer, size)
            with contextlib.suppress(StoreError):
                self._abort(self._key(key), exact=True)
            if not landed:
                address = f"{self.address}/{key}"
                raise explain(error, "upload", address, self._server.endpoint) from error
        except BaseException:  # Ctrl-C: parts that nobody will complete cost money for ever
            with contextlib.suppress(StoreError):
                self._abort(self._key(key), exact=True)
            raise
        else:
            if self._server.left_over(self._key(key), size):
                with contextlib.suppress(StoreError):
                    self._abort(self._key(key), exact=True)

    def _is_ours(self, key: str, writer: str, size: int) -> bool:
        try:
            found = self._head(key, "look at")
        except StoreError as error:
            if error.kind == "missing":
                return False
            raise
        # Metadata travels as headers, whose case servers change: rclone answers Descent-Writer.
        metadata = {name.lower(): value for name, value in found.get("Metadata", {}).items()}
        return metadata.get(_WRITER) == writer and found["ContentLength"] == size

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._asking("delete", key):
                self._client.delete_object(**self._where(key))

    def tidy(self, prefix: str = "", older_than_s: float = 86400.0) -> int:
        base = f"{self.prefix}/" if self.prefix else ""
        return self._abort(base + prefix, older_than_s=older_than_s)

    def _abort(self, full: str, *, exact: bool = False, older_than_s: float | None = None) -> int:
        """End multipart uploads of the key, or below the prefix, `full`; how many there were."""
        count, now = 0, datetime.now(UTC)
        with self._asking("list unfinished uploads"):
            try:
                pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=full)
                found = [upload for page in pages for upload in page.get("Uploads", ())]
            except FAILURES as error:
                # A server without that list keeps no parts that we could find; and rclone says
                # "no such upload" of a bucket that has none.
                if code_of(error) in ("NotImplemented", "MethodNotAllowed", "501", "NoSuchUpload"):
                    return 0
                raise
            for upload in found:
                old = older_than_s is None or (now - upload["Initiated"]).total_seconds() > older_than_s
                if old and (upload["Key"] == full or not exact):
                    try:
                        self._client.abort_multipart_upload(
                            Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                        count += 1
                    except FAILURES as error:
                        if code_of(error) != "NoSuchUpload":
                            raise
        return count


def _retrying(retry: Any) -> tenacity.Retrying:
    """Up to MAX_TRIES attempts while `retry` says so, then the last error."""
    return tenacity.Retrying(
        retry=retry,
        stop=tenacity.stop_after_attempt(MAX_TRIES),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=5.0),  # "full jitter": clients don't retry in step
        reraise=True,
    )


_BODY_CUT = tenacity.retry_if_exception_type(
    (aws.IncompleteReadError, aws.HTTPClientError, aws.ConnectionError, OSError)
)
_KEY_BUSY = tenacity.retry_if_exception(lambda error: code_of(error) == "ConditionalRequestConflict")
"""Somebody else is writing the key at this moment."""


def _verify(path: Path, address: str, size: int | None, sha256: str | None) -> None:
    if size is not None and path.stat().st_size != size:
        raise StoreError(f"{address}: {path.stat().st_size} bytes instead of {size}", kind="damaged")
    if sha256 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise StoreError(f"{address}: is corrupt: its SHA-256 is {found[:12]}…, not {sha256[:12]}…", kind="damaged")


class _ProgressSubscriber:
    """A transfer manager's subscriber that reports the bytes moved."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_queued(self, **_: Any) -> None: ...
    def on_done(self, **_: Any) -> None: ...
    def on_progress(self, bytes_transferred: int, **_: Any) -> None:
        self._progress(bytes_transferred)


def _subscribers(progress: Progress | None) -> list[Any]:
    return [] if progress is None else [_ProgressSubscriber(progress)]
