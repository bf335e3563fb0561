"""The connection to an S3 server: one boto3 client, its transfer manager, and what the server is known to support."""

import contextlib
import importlib.util
import io
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config

from descent.storage.base import Content
from descent.storage.s3_errors import FAILURES, code_of

MAX_TRIES = int(os.environ.get("AWS_MAX_ATTEMPTS", "8"))
_PARALLEL = 10
_PART = 8 << 20
_CRT = importlib.util.find_spec("awscrt") is not None


_REFUSALS = (
    "NotImplemented",
    "501",
    "InvalidArgument",
    "InvalidRequest",
    "BadRequest",
    "400",
    "MissingContentLength",
    "411",
    "XAmzContentSHA256Mismatch",
    "SignatureDoesNotMatch",
    "BadDigest",
    "InvalidDigest",
)
"""How servers answer that don't know the checksum headers which boto3 sends since 1.36; other things are answered so, too."""

T = TypeVar("T")


def takes_native(endpoint: str) -> bool:
    """Whether the native client is used there: on AWS only.

    It sends checksums as trailers, which Ceph RGW 16 refuses (XAmzContentSHA256Mismatch), and
    doesn't understand rclone's answer to CreateMultipartUpload.

    >>> takes_native("https://s3.eu-west-1.amazonaws.com"), takes_native("http://127.0.0.1:9000")
    (True, False)
    """
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


_opened: dict[tuple[object, ...], "Server"] = {}
_opening = threading.Lock()


class Server:
    """A client and what is known of the server behind it; safe to share between threads."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._repeated: set[str] = set()
        """Keys whose CreateMultipartUpload was sent more than once."""
        self._conditional: dict[str, bool] = {}
        self._lock = threading.Lock()
        self.client = self._make_client(when="when_supported")
        self.endpoint = str(self.client.meta.endpoint_url)
        self._native: Any = None
        if _CRT and takes_native(self.endpoint):
            from descent.storage.s3_crt import Native

            self._native = Native(self.client, session, _PART)

    @classmethod
    def open(cls) -> "Server":
        """The server that AWS's own conventions name: environment, profile, role, AWS_ENDPOINT_URL_S3.

        All stores of a process share one, since making a client takes a tenth of a second; a
        new one is made when a setting has changed.
        """
        settings = (MAX_TRIES, *sorted(i for i in os.environ.items() if i[0].startswith("AWS_")))
        with _opening:
            if settings not in _opened:
                _opened.clear()
                _opened[settings] = cls(boto3.session.Session())
            return _opened[settings]

    def _make_client(self, when: str) -> Any:
        """A boto3 client. when: "when_supported" (boto3's default) or "when_required", for sending checksums."""
        # "standard": exponential backoff with jitter, for 5xx, throttling, resets and time-outs
        retries: Any = {
            "mode": os.environ.get("AWS_RETRY_MODE", "standard"),
            "total_max_attempts": MAX_TRIES,
        }
        checksums: Any = {}  # by default as environment and ~/.aws/config say
        if when == "when_required":
            checksums = {"request_checksum_calculation": when, "response_checksum_validation": when}
        config = Config(
            retries=retries,
            connect_timeout=10,
            read_timeout=30,
            tcp_keepalive=True,
            max_pool_connections=_PARALLEL + 2,
            **checksums,
        )
        client = self._session.client("s3", config=config)
        client.meta.events.register("after-call.s3.CreateMultipartUpload", self._created)
        client.meta.events.register("before-call.s3.GetObject", _part_without_checksum)
        return client

    @property
    def sends_checksums(self) -> bool:
        """Whether requests carry a checksum of their content."""
        return str(self.client.meta.config.request_checksum_calculation) != "when_required"

    def extra_arguments(self) -> dict[str, str]:
        """Arguments of every write: CRC32C where this botocore can compute it, else its default (CRC32)."""
        return {"ChecksumAlgorithm": "CRC32C"} if _CRT and self.sends_checksums else {}

    def attempt(self, request: Callable[[], T]) -> T:
        """The result of `request()`, which uses `self.client`.

        A server that may have refused the checksum headers is asked once more without them; if that
        succeeds, no later request carries any. Objects keep SHA-256 and size in a manifest or an index,
        which every reader compares: these headers are not what integrity rests on.
        """
        try:
            return request()
        except FAILURES as error:
            if code_of(error) not in _REFUSALS or not self.sends_checksums or self._native is not None:
                raise
            refused = self.client
            self.client = self._make_client(when="when_required")
            try:
                return request()
            except BaseException:
                self.client = refused
                raise error from None

    def _created(self, parsed: Any, **_: Any) -> None:
        if parsed.get("ResponseMetadata", {}).get("RetryAttempts") and "Key" in parsed:
            self._repeated.add(parsed["Key"])

    def left_over(self, key: str, size: int) -> bool:
        """Whether the upload of `size` bytes that has just ended may have left a second, unfinished one behind.

        That happens when the reply to CreateMultipartUpload is lost, and with it the upload's number.
        Ask once after each upload.
        """
        repeated = key in self._repeated
        self._repeated.discard(key)
        return repeated or (self._native is not None and size >= _PART)  # the native client doesn't report retries

    @contextlib.contextmanager
    def transfers(self) -> Iterator[Any]:
        """boto3's transfer manager; when the block ends, every transfer has finished or failed."""
        if self._native is not None:
            config = TransferConfig(multipart_threshold=_PART, multipart_chunksize=_PART)
            manager = self._native.transfers(config)
        else:
            config = TransferConfig(
                multipart_threshold=_PART,
                multipart_chunksize=_PART,
                max_concurrency=_PARALLEL,
                num_download_attempts=MAX_TRIES,
                preferred_transfer_client="classic",
            )
            manager = create_transfer_manager(self.client, config)
        with manager:
            yield manager

    def conditional(self, bucket: str, key: str) -> bool:
        """Whether the server honours `If-None-Match: *`; found out once a bucket, by writing a probe twice."""
        with self._lock:
            if bucket not in self._conditional:
                probe = {"Bucket": bucket, "Key": f"{key}-{secrets.token_hex(6)}", "Body": b""}
                try:
                    self.attempt(lambda: self.client.put_object(**probe))
                    self._conditional[bucket] = not self._overwrites(probe)
                finally:
                    with contextlib.suppress(*FAILURES):
                        self.client.delete_object(Bucket=bucket, Key=probe["Key"])
            return self._conditional[bucket]

    def _overwrites(self, probe: dict[str, Any]) -> bool:
        try:
            self.client.put_object(**probe, IfNoneMatch="*")
        except FAILURES as error:
            if code_of(error) in ("PreconditionFailed", "412"):
                return False
            if code_of(error) not in ("NotImplemented", "501", "InvalidArgument"):
                raise
        return True


def _part_without_checksum(params: Any, context: Any, **_: Any) -> None:
    """Don't ask for the checksum with a part of an object: rclone sends that of the whole, which never fits."""
    if "Range" in params["headers"]:
        params["headers"].pop("x-amz-checksum-mode", None)
        context.get("checksum", {}).pop("response_algorithms", None)


class View(io.RawIOBase):
    """Memory as a file of fixed size that the transfer manager reads from or writes to, without a copy."""

    def __init__(self, content: Content) -> None:
        super().__init__()
        self._view, self._at = memoryview(content).cast("B"), 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return not self._view.readonly

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._view.nbytes}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._view.nbytes if size is None or size < 0 else self._at + size
        found = bytes(self._view[self._at : stop])
        self._at += len(found)
        return found

    def readinto(self, buffer: Any) -> int:
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self._view[self._at : self._at + view.nbytes] = view  # ValueError where it doesn't fit
        self._at += view.nbytes
        return view.nbytes
