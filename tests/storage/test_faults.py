"""Whatever the network does, a transfer ends right or with one clear error, and leaves nothing half done."""

import hashlib
import os
import random
import signal
import threading
from pathlib import Path

import pytest

from descent.errors import StoreError
from descent.storage import Store, open_store, s3, s3_client
from tests.storage.proxy import FAULTS, Proxy, Request, always, first, sometimes
from tests.storage.servers import S3Server

BIG = random.Random(1).randbytes(33_000_000)
DIGEST = hashlib.sha256(BIG).hexdigest()


@pytest.fixture
def store(proxy: Proxy, bucket: str) -> Store:
    """A store behind the proxy."""
    assert proxy.plan
    return open_store(f"s3://{bucket}/p")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tries instead of eight, for faults that don't go away."""
    monkeypatch.setattr(s3_client, "MAX_TRIES", 3)
    monkeypatch.setattr(s3, "MAX_TRIES", 3)


def whole_or_absent(server: S3Server, bucket: str, content: bytes = BIG) -> int:
    """How many objects there are: each is whole, and no parts of others lie about."""
    assert server.unfinished(bucket) == []
    client = server.client()
    found = client.list_objects_v2(Bucket=bucket).get("Contents", ())
    for entry in found:
        assert client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read() == content
    return len(found)


CURABLE = {
    "30% 503 SlowDown": lambda: sometimes(0.3, ("busy",), 1),
    "30% 500": lambda: sometimes(0.3, ("broken",), 2),
    "connections cut in the middle of a part": lambda: first("part", "cut request", 2),
    "replies cut in the middle": lambda: first("get", "cut reply", 2),
    "lost replies to CompleteMultipartUpload": lambda: first("complete", "lost reply"),
    "lost replies to CreateMultipartUpload": lambda: first("create", "lost reply"),
    "lost replies to parts": lambda: first("part", "lost reply", 3),
    "20% of everything": lambda: sometimes(0.2, FAULTS[:-1], 3),
}


@pytest.mark.parametrize("name", CURABLE)
def test_what_passes_is_survived(
    name: str, proxy: Proxy, store: Store, server: S3Server, bucket: str, tmp_path: Path
) -> None:
    proxy.plan = CURABLE[name]()
    store.upload(memoryview(BIG), "object")
    assert whole_or_absent(server, bucket) == 1
    store.download("object", tmp_path / "back", size=len(BIG), sha256=DIGEST)
    assert bytes(store.read("object", len(BIG))) == BIG == (tmp_path / "back").read_bytes()
    assert store.get_range("object", 5, 1_000_000) == BIG[5:1_000_000]
    assert store.get("object") == BIG
    assert sum(proxy.counts[fault] for fault in FAULTS) > 0, "the fault was injected"


@pytest.mark.one_server
def test_ten_times_the_latency(proxy: Proxy, store: Store, server: S3Server, bucket: str) -> None:
    proxy.latency_s = 0.3
    store.upload(memoryview(BIG), "object")
    assert bytes(store.read("object", len(BIG))) == BIG
    assert whole_or_absent(server, bucket) == 1


LASTING = {
    "busy for ever": (always("busy"), "unavailable", "503 SlowDown"),
    "expired credentials": (always("expired"), "credentials", "expired"),
    "no permission": (always("denied"), "denied", "don't allow it"),
    "parts never pass": (always("cut request", "part"), "unavailable", "doesn't answer"),
    "never completes": (always("broken", "complete"), "unavailable", "still answers 500"),
    "expires half way": (
        lambda r: "expired" if r.kind in ("part", "complete") and r.key and _late(r) else None,
        "credentials",
        "expired",
    ),
}
_counted = {"parts": 0}


def _late(request: Request) -> bool:
    _counted["parts"] += request.kind == "part"
    return _counted["parts"] > 2


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.one_server if n == "busy for ever" else ()) for n in LASTING]
)
def test_what_lasts_is_one_clear_error(name: str, proxy: Proxy, store: Store, server: S3Server, bucket: str) -> None:
    _counted["parts"] = 0
    proxy.plan, kind, words = LASTING[name]
    with pytest.raises(StoreError, match=words) as caught:
        store.upload(memoryview(BIG), "object")
    line = str(caught.value)
    assert caught.value.kind == kind and line.startswith(f"s3://{bucket}/p/object: can't upload")
    assert server.secret_key not in line and "\n" not in line
    proxy.plan = lambda _: None
    store.tidy(older_than_s=-60)  # what could not be aborted while nothing passed
    assert whole_or_absent(server, bucket) == 0


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "fault",
    [
        "cut reply",
        *(pytest.param(f, marks=pytest.mark.one_server) for f in ("busy", "expired")),
    ],
)
def test_a_failed_download_leaves_what_was_there(fault: str, proxy: Proxy, store: Store, tmp_path: Path) -> None:
    store.upload(memoryview(BIG), "object")
    target = tmp_path / "kept"
    target.write_bytes(b"older")
    proxy.plan = always(fault, "get")
    for ask in (
        lambda: store.download("object", target),
        lambda: store.read("object", len(BIG)),
        lambda: store.get("object"),
    ):
        with pytest.raises(StoreError, match="object: can't"):
            ask()
    assert [p.name for p in tmp_path.iterdir()] == ["kept"] and target.read_bytes() == b"older"


def test_a_lost_reply_is_no_lost_race(proxy: Proxy, store: Store) -> None:
    proxy.plan = first("put", "lost reply")
    assert store.put_if_absent("once", b"mine")
    assert not store.put_if_absent("once", b"another's") and store.get("once") == b"mine"


@pytest.mark.usefixtures("impatient")
@pytest.mark.one_server
def test_a_server_that_is_gone(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    store = open_store(f"s3://{bucket}/p")
    for ask in (
        lambda: store.put("x", b""),
        lambda: store.get("x"),
        lambda: list(store.list()),
        lambda: store.upload(BIG, "x"),
        lambda: store.find("x"),
        lambda: store.delete(["x"]),
    ):
        with pytest.raises(StoreError, match=r"127\.0\.0\.1:9 doesn't answer"):
            ask()


@pytest.mark.one_server
@pytest.mark.parametrize(
    "refusal",
    ["501 NotImplemented", "400 InvalidArgument", "400 XAmzContentSHA256Mismatch", "403 SignatureDoesNotMatch"],
)
@pytest.mark.parametrize("begin_with", ["put", "upload", "put_if_absent", "get"])
def test_a_server_that_refuses_checksum_headers_is_served_without(
    proxy: Proxy, store: Store, server: S3Server, bucket: str, tmp_path: Path, refusal: str, begin_with: str
) -> None:
    server.client().put_object(Bucket=bucket, Key="p/there", Body=b"content")
    proxy.plan = always(f"no checksums: {refusal}")
    if begin_with == "put":
        store.put("x", b"small")
    elif begin_with == "upload":
        store.upload(BIG, "x")
    elif begin_with == "put_if_absent":
        assert store.put_if_absent("x", b"mine") and not store.put_if_absent("x", b"another's")
    store.upload(memoryview(BIG), "big")
    assert store.get("there") == b"content" and store.get_range("big", 10, 20) == BIG[10:20]
    assert store.read("big", len(BIG)) == BIG
    store.download("big", tmp_path / "big", size=len(BIG), sha256=DIGEST)
    assert store.put_if_absent("once", b"mine") and not store.put_if_absent("once", b"another's")
    assert server.unfinished(bucket) == []
    assert not store._server.sends_checksums  # type: ignore[attr-defined]


@pytest.mark.one_server
def test_a_refusal_for_another_reason_keeps_the_checksums(proxy: Proxy, store: Store) -> None:
    proxy.plan = first("put", "expired")
    with pytest.raises(StoreError, match="credentials have expired"):
        store.put("x", b"content")
    seen: list[str] = []
    proxy.plan = lambda request: seen.append(request.kind) or None  # type: ignore[func-returns-value]
    store.put("x", b"content")
    assert store._server.sends_checksums and seen == ["put"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("address", ["s3://", "s3://B", "s3:///x", "s3://b/../x", "s3://me:pw@bucket/x"])
def test_a_wrong_address_is_refused_without_its_password(address: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(address)
    assert "pw@" not in str(caught.value)


def test_settings_that_are_wrong_are_named(server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="no such bucket") as caught:
        open_store("s3://nobody-has-this/x").put("x", b"")
    assert caught.value.kind == "address"
    with monkeypatch.context() as patch:
        patch.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(StoreError, match="AWS_PROFILE names a profile"):
            open_store(f"s3://{bucket}/x")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", "not an address")
        with pytest.raises(StoreError, match="AWS_ENDPOINT_URL_S3"):
            open_store(f"s3://{bucket}/x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID") as caught:
        open_store(f"s3://{bucket}/x").get("x")
    assert caught.value.kind == "credentials"
    if server.authenticates:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(StoreError, match="secret key doesn't fit") as caught:
            open_store(f"s3://{bucket}/x").put("x", b"")
        assert caught.value.kind == "credentials"


def test_an_interrupted_upload_leaves_no_parts(proxy: Proxy, store: Store, server: S3Server, bucket: str) -> None:
    proxy.latency_s = 0.05
    pressed = threading.Event()

    def press_ctrl_c(_: int) -> None:
        if not pressed.is_set():
            pressed.set()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        store.upload(memoryview(BIG), "object", press_ctrl_c)
    whole_or_absent(server, bucket)
