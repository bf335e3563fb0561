"""The connection to an S3 server: one boto3 client, its transfer manager, and what the server can do."""

import contextlib
import importlib.util
import io
import os
import secrets
import threading
from collections.abc import Iterator
from typing import Any
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


def extra_arguments() -> dict[str, str]:
    """What every write says: CRC32C where this botocore can compute it, else its default (CRC32)."""
    return {"ChecksumAlgorithm": "CRC32C"} if _CRT else {}


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

    def __init__(self, client: Any, native: Any = None) -> None:
        self.client = client
        self._native = native
        """`s3_crt.Native` where the native client is installed."""
        self.endpoint = str(client.meta.endpoint_url)
        self._repeated: set[str] = set()
        """Keys whose CreateMultipartUpload was sent more than once."""
        self._conditional: dict[str, bool] = {}
        self._lock = threading.Lock()
        client.meta.events.register("after-call.s3.CreateMultipartUpload", self._created)
        client.meta.events.register("before-call.s3.GetObject", _part_without_checksum)

    @classmethod
    def open(cls) -> "Server":
        """By AWS's own conventions: environment, profile, role, AWS_ENDPOINT_URL_S3.

        One for all stores of a process, since a client takes a tenth of a second to make; a
        new one when a setting has changed.
        """
        settings = (MAX_TRIES, *sorted(i for i in os.environ.items() if i[0].startswith("AWS_")))
        with _opening:
            if settings not in _opened:
                _opened.clear()
                _opened[settings] = cls._connect()
            return _opened[settings]

    @classmethod
    def _connect(cls) -> "Server":
        # "standard": exponential backoff with jitter, for 5xx, throttling, resets and time-outs
        retries: Any = {
            "mode": os.environ.get("AWS_RETRY_MODE", "standard"),
            "total_max_attempts": MAX_TRIES,
        }
        config = Config(
            retries=retries,
            connect_timeout=10,
            read_timeout=30,
            tcp_keepalive=True,
            max_pool_connections=_PARALLEL + 2,
        )
        session: Any = boto3.session.Session()
        client = session.client("s3", config=config)
        if not (_CRT and takes_native(str(client.meta.endpoint_url))):
            return cls(client)
        from descent.storage.s3_crt import Native

        return cls(client, Native(client, session, _PART))

    def _created(self, parsed: Any, **_: Any) -> None:
        if parsed.get("ResponseMetadata", {}).get("RetryAttempts") and "Key" in parsed:
            self._repeated.add(parsed["Key"])

    def left_over(self, key: str, size: int) -> bool:
        """Whether the upload of so many bytes, just done, may have left another behind: one whose
        number got lost with the reply to CreateMultipartUpload. Asked once after each upload."""
        repeated = key in self._repeated
        self._repeated.discard(key)
        return repeated or (self._native is not None and size >= _PART)  # it doesn't tell

    @contextlib.contextmanager
    def transfers(self) -> Iterator[Any]:
        """boto3's transfer manager; at the end of the block it has finished or given up."""
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
        """Whether the server honours `If-None-Match: *`; found out once, by writing a probe twice."""
        with self._lock:
            if bucket not in self._conditional:
                probe = {"Bucket": bucket, "Key": f"{key}-{secrets.token_hex(6)}", "Body": b""}
                try:
                    self.client.put_object(**probe)
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
