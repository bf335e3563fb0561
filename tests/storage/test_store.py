"""What a store promises, on a folder and on S3 servers alike."""

import hashlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from descent.errors import StoreError
from descent.storage import Store, open_store
from tests.storage.conftest import SERVERS
from tests.storage.servers import S3Server

BIG = random.Random(0).randbytes(20_000_001)


@pytest.fixture(params=["folder", *SERVERS])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "folder":
        yield open_store(tmp_path / "root")
        return
    server: S3Server = request.getfixturevalue("running")[request.param]
    patch = request.getfixturevalue("monkeypatch")
    for name, value in server.environment().items():
        patch.setenv(name, value)
    bucket = f"test-{random.randbytes(6).hex()}"
    server.client().create_bucket(Bucket=bucket)
    yield open_store(f"s3://{bucket}/a/b")
    assert server.unfinished(bucket) == []


def size(store: Store, key: str) -> int | None:
    entry = store.find(key)
    return None if entry is None else entry.size


def keys(store: Store, prefix: str = "") -> list[str]:
    return [entry.key for entry in store.list(prefix)]


def test_small_objects(store: Store) -> None:
    assert size(store, "x") is None and keys(store) == []
    store.put("x", b"first")
    store.put("x", b"second")
    store.put("d/empty", b"")
    store.at("d").put("é ö+%?.txt", memoryview(b"odd name"))
    assert (store.get("x"), size(store, "x"), store.get("d/empty")) == (b"second", 6, b"")
    assert store.get_range("x", 1, 4) == b"eco"
    assert keys(store) == ["d/empty", "d/é ö+%?.txt", "x"] and keys(store, "d/e") == ["d/empty"]
    assert store.at("d").get("é ö+%?.txt") == b"odd name"
    store.delete(["x", "nothing", "d/empty", "d/é ö+%?.txt"])
    assert keys(store) == []


def test_what_is_missing_is_named(store: Store, tmp_path: Path) -> None:
    for ask in (
        lambda: store.get("a/no"),
        lambda: store.get_range("a/no", 0, 1),
        lambda: store.read("a/no", 3),
        lambda: store.download("a/no", tmp_path / "t"),
    ):
        with pytest.raises(StoreError, match="a/no") as caught:
            ask()
        assert caught.value.kind == "missing"
    assert not (tmp_path / "t").exists()


def test_a_target_that_can_not_be_written_is_named(store: Store, tmp_path: Path) -> None:
    store.put("x", b"content")
    (tmp_path / "file").write_bytes(b"")
    for target in (tmp_path / "file" / "below", tmp_path / "folder"):
        (tmp_path / "folder" / "full").mkdir(parents=True, exist_ok=True)
        with pytest.raises(StoreError, match=str(target)):
            store.download("x", target)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "root") == ["file", "folder"]


@pytest.mark.one_server
@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "", "a//b", ".", "a\0b"])
def test_a_key_stays_inside(store: Store, key: str) -> None:
    for ask in (
        lambda: store.put(key, b""),
        lambda: store.get(key),
        lambda: store.delete([key]),
        lambda: size(store, key),
        lambda: size(store.at(key), "x"),
    ):
        with pytest.raises(StoreError, match="is no key"):
            ask()


def test_large_objects_from_file_and_memory(store: Store, tmp_path: Path) -> None:
    file, back = tmp_path / "big", tmp_path / "deep" / "back"
    file.write_bytes(BIG)
    moved: list[int] = []
    store.upload(file, "file", moved.append)
    assert sum(moved) >= len(BIG)
    store.upload(memoryview(BIG), "memory")
    assert size(store, "file") == size(store, "memory") == len(BIG)
    assert bytes(store.read("file", len(BIG))) == BIG
    digest = hashlib.sha256(BIG).hexdigest()
    store.download("memory", back, size=len(BIG), sha256=digest)
    assert back.read_bytes() == BIG
    assert store.get_range("memory", 8_388_600, 8_388_700) == BIG[8_388_600:8_388_700]
    store.upload(b"", "nothing")
    assert size(store, "nothing") == 0 and store.read("nothing", 0) == b""


def test_what_is_not_as_expected_is_not_taken(store: Store, tmp_path: Path) -> None:
    store.put("x", b"content")
    for wrong in ({"size": 6}, {"sha256": "0" * 64}):
        with pytest.raises(StoreError, match="x: ") as caught:
            store.download("x", tmp_path / "t", **wrong)  # type: ignore[arg-type]
        assert caught.value.kind == "damaged"
    for size in (6, 8):
        with pytest.raises(StoreError, match=str(size)):
            store.read("x", size)
    with pytest.raises(StoreError):
        store.get_range("x", 5, 9)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []


def test_of_many_who_put_if_absent_one_wins(store: Store, request: pytest.FixtureRequest) -> None:
    assert store.put_if_absent("first", b"one")
    assert not store.put_if_absent("first", b"two") and store.get("first") == b"one"
    name = request.node.callspec.params["store"]
    conditional = name == "folder" or request.getfixturevalue("running")[name].conditional
    won: list[int] = []
    gate = threading.Barrier(12)

    def race(number: int) -> None:
        gate.wait()
        if store.put_if_absent("race", b"%02d" % number):
            won.append(number)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if conditional:
        assert [b"%02d" % n for n in won] == [store.get("race")]
    else:  # more than one call may return True, never none; and one writer's object is there, whole
        assert won and int(store.get("race")) in range(12)
        assert not store.put_if_absent("race", b"late") and size(store, "race") == 2
    assert not [k for k in keys(store) if "probe" in k]


def test_left_overs_are_tidied_away(tmp_path: Path, s3: Store, server: S3Server, bucket: str) -> None:
    server.client().create_multipart_upload(Bucket=bucket, Key="some/prefix/d/half")
    server.client().create_multipart_upload(Bucket=bucket, Key="other/half")
    assert s3.tidy(older_than_s=1e10) == 0
    assert s3.tidy("d/", older_than_s=-5) == 1
    assert server.unfinished(bucket) == ["other/half"]
    server.client().abort_multipart_upload(
        Bucket=bucket,
        Key="other/half",
        UploadId=server.client().list_multipart_uploads(Bucket=bucket)["Uploads"][0]["UploadId"],
    )
    folder = open_store(tmp_path)
    (tmp_path / ".x.123.partial").write_bytes(b"half")
    assert keys(folder) == [] and folder.tidy(older_than_s=3600) == 0
    assert folder.tidy(older_than_s=-1) == 1 and os.listdir(tmp_path) == []
