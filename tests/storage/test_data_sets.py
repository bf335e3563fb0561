"""Sharded sets on a real S3 server: copied, verified, and read as the local one, also through faults."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from descent.cli.main import app
from descent.data import cache as cache_module
from descent.data.arrays import Arrays
from descent.data.cache import use_cache
from descent.data.csv_file import Csv
from descent.data.parquet import Parquet
from descent.data.tokens import Tokens
from descent.errors import DataError
from descent.training.input.feed import Feed
from descent.training.input.sampling import SampleOrder
from tests.storage.proxy import sometimes
from tests.unit.test_data_tables import IRIS
from tests.unit.test_data_tokens import write_tokens

pytestmark = pytest.mark.one_server


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Ten shards of tokens in a folder; the node's cache holds six of them."""
    rng = np.random.default_rng(0)
    write_tokens(tmp_path / "set", [rng.integers(0, 256, 401) for _ in range(10)], "uint8", 256)
    monkeypatch.setattr(cache_module, "_cache", [])
    use_cache(str(tmp_path / "cache"), 2.6e-6)
    return tmp_path / "set"


def descent(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["data", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_copied_to_s3_a_set_is_the_same_and_trains_the_same(local, bucket, tmp_path):
    there = f"s3://{bucket}/sets/tokens"
    assert "4,010 tokens in 10 shards" in descent("copy", str(local), there)
    assert "10 of its files were there already" in descent("copy", str(local), there)
    assert "all shards are what the index says" in descent("inspect", there, "--verify")
    far, near = Tokens(there, 8, window=100), Tokens(str(local), 8, window=100)
    assert far.digest == near.digest
    order = SampleOrder.of(far, 50, seed=2)
    feed = Feed(far, order, torch.device("cpu"))
    for step in range(1, 21):
        feed.prepare(step, [(0, (0, 50))], 25)
        got = [torch.cat(p) for p in zip(feed.fetch(step, 0, 25), feed.fetch(step, 25, 50), strict=True)]
        torch.testing.assert_close(got, list(near.gather(order.samples_of(step))))
    descent("copy", there, str(tmp_path / "back"))
    for file in local.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_through_a_server_that_often_fails_the_set_is_the_same(local, bucket, proxy):
    there = f"s3://{bucket}/set"
    descent("copy", str(local), there)
    proxy.plan = sometimes(0.2, ("busy", "broken", "cut reply"), 1)
    far = Tokens(there, 8, window=100)
    torch.testing.assert_close(far.gather(np.arange(200)), Tokens(str(local), 8).gather(np.arange(200)))


def test_a_shard_that_was_changed_on_the_server_is_named(local, bucket, server):
    there = f"s3://{bucket}/set"
    descent("copy", str(local), there)
    server.client().put_object(Bucket=bucket, Key="set/3.bin", Body=b"x" * 401)
    with pytest.raises(DataError, match=r"set/3\.bin: is corrupt: its SHA-256 is"):
        Tokens(there, 8, window=100).gather(np.arange(3 * 50, 3 * 50 + 5))
    done = CliRunner().invoke(app, ["data", "inspect", there, "--verify"])
    assert done.exit_code == 1 and "set/3.bin: is corrupt" in done.output


def test_single_files_on_s3_and_what_is_not_there(local, bucket, server, tmp_path):
    x = np.random.default_rng(0).random((20, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", inputs=x, targets=np.arange(20) % 2)
    IRIS.to_parquet(tmp_path / "t.parquet")
    use_cache(str(tmp_path / "cache"), 1e-3)
    for name in ("a.npz", "t.parquet"):
        server.client().upload_file(str(tmp_path / name), bucket, f"files/{name}")
    arrays = Arrays(f"s3://{bucket}/files/a.npz")
    np.testing.assert_array_equal(arrays.gather(np.arange(20))[0], x)
    assert len(Parquet(f"s3://{bucket}/files/t.parquet", "target")) == 150
    with pytest.raises(DataError, match="none"):
        Arrays(f"s3://{bucket}/files/none.npz")
    with pytest.raises(DataError, match=r"index\.json"):
        Tokens(f"s3://{bucket}/nothing")
    assert local.is_dir()


@pytest.mark.usefixtures("local")
def test_a_csv_on_s3_is_read_through_the_cache_and_a_large_one_is_not_even_fetched(bucket, server, tmp_path):
    content = IRIS.to_csv(index=False).encode()
    server.client().put_object(Bucket=bucket, Key="sets/iris.csv", Body=content)
    (tmp_path / "iris.csv").write_bytes(content)
    there = f"s3://{bucket}/sets/iris.csv"
    with pytest.raises(DataError, match=r"more than data.max_mb=0.001"):
        Csv(there, "target", max_mb=0.001)
    assert not [f for f in (tmp_path / "cache").rglob("*.csv") if f.is_file()]
    with pytest.raises(DataError, match=r"the cache holds 2600: .* data.cache.gb"):
        Csv(there, "target")
    use_cache(str(tmp_path / "cache"), 1e-3)
    far, near = Csv(there, "target"), Csv(str(tmp_path / "iris.csv"), "target")
    torch.testing.assert_close((far.inputs, far.targets), (near.inputs, near.targets))
