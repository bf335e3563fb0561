"""Every test of a store runs against a folder and against moto's server; others are named in the environment."""

import contextlib
import importlib.util
import os
import secrets
from collections.abc import Iterator

import pytest

from descent.storage import Store, open_store, s3_client
from tests.storage import servers
from tests.storage.proxy import Proxy, proxy_to
from tests.storage.servers import S3Server

SERVERS = ["moto", *os.environ.get("DESCENT_TEST_S3", "").split()]
"""DESCENT_TEST_S3="rgw rclone" adds these; see make test-s3."""


@pytest.fixture(autouse=True)
def native_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """With DESCENT_TEST_CRT=1 and awscrt installed, moto's server is served as AWS is: by the native client."""
    if os.environ.get("DESCENT_TEST_CRT"):
        assert importlib.util.find_spec("awscrt"), "pip install 'boto3[crt]'"
        monkeypatch.setattr(s3_client, "takes_native", lambda _: True)


@pytest.fixture(scope="session")
def running() -> Iterator[dict[str, S3Server]]:
    """The servers that have been started so far; each lives until the session's end."""
    with contextlib.ExitStack() as stack:

        class Servers(dict[str, S3Server]):
            def __missing__(self, name: str) -> S3Server:
                self[name] = stack.enter_context(getattr(servers, name)())
                return self[name]

        yield Servers()


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, running: dict[str, S3Server], monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 server, with the environment pointing at it."""
    found = running[request.param]
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.fixture
def bucket(server: S3Server) -> str:
    """A bucket of the test's own."""
    name = f"test-{secrets.token_hex(6)}"
    server.client().create_bucket(Bucket=name)
    return name


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the server, with the environment pointing at it."""
    with proxy_to(server.host, server.port) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", found.url)
        yield found


@pytest.fixture
def s3(bucket: str) -> Store:
    """A store on the server, without the proxy."""
    return open_store(f"s3://{bucket}/some/prefix")
