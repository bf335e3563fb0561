"""Checkpoints on S3: the same promises as on disk."""

import random

import pytest
import torch

from descent.checkpoint.manifest import commit_checkpoint
from descent.checkpoint.reader import NoCheckpoint, list_checkpoints, newest_checkpoint, read_checkpoint
from descent.checkpoint.retention import Retention, prune
from descent.checkpoint.writer import ShareWriter
from descent.errors import CheckpointError, StoreError
from descent.messages import ShareWritten
from descent.storage import Location, to_location
from tests.storage.proxy import Proxy, always, first
from tests.storage.servers import S3Server

TENSORS = {
    f"{group}/{i}": torch.randn(400_000, generator=torch.Generator().manual_seed(i))
    for group in ("model", "optimizer")
    for i in range(12)
}


def write_shares(root: Location, step: int, world: int = 2) -> list[ShareWritten]:
    shares: list[ShareWritten] = []
    for rank in range(world):
        writer = ShareWriter(root, shares.append)
        writer.write(TENSORS, step=step, rank=rank, world_size=world, generation=1, scalars={"evaluated": 1})
        writer.wait_until_written()
    return shares


def make_checkpoint(root: Location, step: int) -> Location:
    return commit_checkpoint(root, write_shares(root, step), run="r", config_sha256="c")


@pytest.fixture
def root(bucket: str) -> Location:
    return to_location(f"s3://{bucket}/runs/mine/")


def test_written_and_read(root: Location, server: S3Server, bucket: str) -> None:
    with pytest.raises(NoCheckpoint):
        newest_checkpoint(root)
    make_checkpoint(root, 10)
    make_checkpoint(root, 20)
    write_shares(root, 30)  # not committed
    target, skipped = newest_checkpoint(root)
    assert (str(target), skipped) == (f"s3://{bucket}/runs/mine/step-00000020", [])
    tensors, manifest = read_checkpoint(target)
    assert manifest.step == 20 and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[n], t) for n, t in TENSORS.items())
    make_checkpoint(root, 20)  # once more, as after going back: the same content
    assert prune(root, Retention(1)) == (["step-00000010"], [])
    assert [t.name for t in list_checkpoints(root)] == ["step-00000020"]
    assert server.unfinished(bucket) == []


@pytest.mark.parametrize(
    "how",
    [
        "flip",
        "manifest of another",
        *(pytest.param(h, marks=pytest.mark.one_server) for h in ("truncate", "delete", "swap", "manifest flip")),
    ],
)
def test_damage_is_found_and_the_one_before_is_taken(root: Location, server: S3Server, bucket: str, how: str) -> None:
    make_checkpoint(root, 10)
    make_checkpoint(root, 20)
    client = server.client()
    key = f"runs/mine/step-00000020/{'manifest.json' if 'manifest' in how else 'model-00001-of-00002.safetensors'}"
    whole = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    at = random.Random(how).randrange(len(whole))
    if how == "delete":
        client.delete_object(Bucket=bucket, Key=key)
    else:
        other = key.replace("00000020", "00000010")
        content = {
            "truncate": whole[:at],
            "flip": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
            "swap": whole[::-1],
            "manifest flip": whole.replace(b'"step": 20', b'"step": 21'),
            "manifest of another": client.get_object(Bucket=bucket, Key=other)["Body"].read(),
        }[how]
        client.put_object(Bucket=bucket, Key=key, Body=content)
    target, skipped = newest_checkpoint(root)
    assert target.name == "step-00000010" and len(skipped) == 1 and "step-00000020" in skipped[0]


@pytest.mark.one_server
def test_a_server_that_does_not_answer_is_no_missing_checkpoint(
    root: Location, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run would start afresh, or go further back, because of a network."""
    from descent.storage import s3_client

    make_checkpoint(root, 10)
    monkeypatch.setattr(s3_client, "MAX_TRIES", 2)
    for fault, kind in (("busy", "unavailable"), ("expired", "credentials"), ("denied", "denied")):
        proxy.plan = always(fault)
        for ask in (lambda: newest_checkpoint(root), lambda: read_checkpoint(root / "step-00000010")):
            with pytest.raises(StoreError) as caught:
                ask()
            assert caught.value.kind == kind and not isinstance(caught.value, CheckpointError)
        shares = write_shares(root, 20, world=1)
        assert shares[0].error is not None and "can't upload" in shares[0].error
    proxy.plan = lambda _: None
    assert newest_checkpoint(root)[0].name == "step-00000010"
    assert commit_checkpoint(root, write_shares(root, 20), run="r", config_sha256="c").name == "step-00000020"


def test_a_lost_reply_to_the_commit_is_no_failure(root: Location, proxy: Proxy) -> None:
    proxy.plan = first("put", "lost reply")
    target = make_checkpoint(root, 10)
    assert newest_checkpoint(root) == (target, [])
