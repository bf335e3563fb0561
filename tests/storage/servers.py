"""S3 servers for the tests, each a process of its own that is gone at the end."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config


@dataclass(frozen=True)
class S3Server:
    """Where it listens, who may in, and what it can do."""

    name: str
    host: str
    port: int
    access_key: str
    secret_key: str
    conditional: bool = True
    """Whether put-if-absent has one winner."""
    authenticates: bool = False

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def environment(self, url: str | None = None) -> dict[str, str]:
        """What AWS's tools read, pointed at this server (or at a proxy in front of it)."""
        return {
            "AWS_ENDPOINT_URL_S3": url or self.url, "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key, "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }  # fmt: skip

    def client(self) -> Any:
        """A client of the test's own, past any proxy."""
        return boto3.client(
            "s3", endpoint_url=self.url, aws_access_key_id=self.access_key, region_name="us-east-1",
            aws_secret_access_key=self.secret_key, config=Config(s3={"addressing_style": "path"}),
        )  # fmt: skip

    def unfinished(self, bucket: str) -> list[str]:
        """Keys of multipart uploads that were neither completed nor aborted."""
        return [u["Key"] for u in self.client().list_multipart_uploads(Bucket=bucket).get("Uploads", ())]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(command: list[str], port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that listens on `port`."""
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None and time.monotonic() < deadline, (
                folder / "log.txt"
            ).read_text()
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


@contextlib.contextmanager
def moto() -> Iterator[S3Server]:
    """moto's server: takes any credentials, knows conditional writes, keeps all in memory."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with started(command, port, Path(folder)):
            yield S3Server("moto", "127.0.0.1", port, "key", secrets.token_hex(8))
