"""A data set that is no longer what it was is named: before a resume, when a worker joins, and while it is read."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_iris

from descent.cluster.run.resume import Resumed, refuse_other_data
from descent.config import compose
from descent.data.arrays import Arrays
from descent.data.csv_file import Csv
from descent.data.digits import Digits
from descent.data.identity import difference, identity_of
from descent.data.map_style import MapStyle
from descent.data.parquet import Parquet
from descent.data.splits import hold_out
from descent.data.text import Text
from descent.data.tokenize import Bytes, tokenize
from descent.data.tokens import Tokens
from descent.errors import CheckpointError, DataError
from descent.training.input.feed import Feed
from descent.training.input.sampling import SampleOrder
from descent.training.plan import build_data, prepare

IRIS = load_iris(as_frame=True).frame
CPU = torch.device("cpu")


def rows(names: list[str]) -> str:
    return "x,y\n" + "".join(f"{i},{names[i % len(names)]}\n" for i in range(60))


def test_other_classes_other_samples_and_another_number_are_told_apart(tmp_path):
    file = tmp_path / "a.csv"

    def identity(text: str) -> dict:
        file.write_text(text)
        return identity_of(Csv(str(file), "y", split="train"))

    before = identity(rows(["no", "yes"]))
    assert before["class_names"] == ["no", "yes"]
    assert difference(before, identity(rows(["no", "yes"]))) is None
    assert difference(before, identity(rows(["zero", "yes"]))) == "its classes are yes, zero, they were no, yes"
    assert difference(before, identity(rows(["yes", "no"]))).startswith("its samples differ (digest ")
    assert difference(before, identity(rows(["no", "yes"]) + "1,no\n" * 10)) == "it has 63 samples, it had 54"


def test_names_of_columns_and_classes_are_part_of_the_digest(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text(rows(["a", "b"]))
    first = Csv(str(file), "y").digest
    file.write_text(rows(["a", "c"]))
    assert Csv(str(file), "y").digest != first
    file.write_text(rows(["a", "b"]).replace("x,y", "z,y"))
    assert Csv(str(file), "y").digest != first


def test_a_resume_with_changed_data_is_refused_with_what_changed_and_what_to_do(tmp_path):
    now = {"train": identity_of(Digits("train")), "evaluate": identity_of(Digits("evaluate"))}

    def resumed(data) -> Resumed:
        values = dict.fromkeys(Resumed.__dataclass_fields__)
        return Resumed(**{**values, "run_dir": tmp_path / "run-1", "data": data})

    refuse_other_data(resumed(now), now)
    refuse_other_data(resumed(None), now)
    other = {**now, "train": {**now["train"], "digest": "0" * 16}}
    with pytest.raises(CheckpointError, match=r"^resume=run-1: data\.train is not the data set .* its samples differ"):
        refuse_other_data(resumed(other), now)
    with pytest.raises(CheckpointError, match=r"begin a new run from these weights: init_from=run-1$"):
        refuse_other_data(resumed({**now, "evaluate": {**now["evaluate"], "class_names": ["a"]}}), now)


class Digest(torch.utils.data.Dataset):
    """A user's class."""

    digest = "0" * 16

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.zeros(1), index % 2


def test_a_users_class_is_compared_where_texts_are_hashed_alike_in_every_process(monkeypatch):
    data = MapStyle(Digest())
    for randomized, digest in ((0, "0" * 16), (1, None)):
        monkeypatch.setattr(
            "descent.data.identity.sys", SimpleNamespace(flags=SimpleNamespace(hash_randomization=randomized))
        )
        assert identity_of(data)["digest"] == digest
        assert identity_of(Digits())["digest"] == Digits().digest
    assert difference({**identity_of(data), "digest": "1" * 16}, identity_of(data)) is None
    assert "it has 4 samples, it had 5" in difference({**identity_of(data), "num_samples": 5}, identity_of(data))


def test_the_identities_are_part_of_what_is_prepared():
    found = prepare(compose(["data=digits"]).config, cores=1, gpus=0)
    assert found.data_identities["train"] == identity_of(Digits("train"))
    assert found.data_identities["evaluate"]["class_names"] == [str(i) for i in range(10)]
    assert found.plan.data_digest == found.train.digest


def test_a_worker_that_builds_other_data_than_the_run_began_with_is_refused(tmp_path):
    x, y = load_digits(return_X_y=True)
    np.savez(tmp_path / "a.npz", inputs=x, targets=y)
    config = compose(["data=arrays", f"data.path={tmp_path / 'a.npz'}"]).config
    digest = build_data(config)[0].digest
    assert build_data(config, digest)[0].digest == digest
    x[1000, 20] += 1
    np.savez(tmp_path / "a.npz", inputs=x, targets=y)
    with pytest.raises(DataError, match=r"^data\.train: .*a\.npz has changed since the run began \(digest "):
        build_data(config, digest)


def test_the_digest_of_a_mapped_file_follows_its_size_and_its_stretches(tmp_path, monkeypatch):
    monkeypatch.setattr("descent.data.text.LARGE", 1)
    monkeypatch.setattr("descent.data.base._STRETCH_BYTES", 1 << 10)
    file = tmp_path / "a.txt"
    content = bytearray(np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes())

    def digest() -> str:
        file.write_bytes(content)
        return Text(str(file), 64).digest

    first = digest()
    assert digest() == first
    content[100] ^= 1
    second = digest()
    content += bytes(64)
    assert len({first, second, digest()}) == 3


def mapped(kind: str, folder):
    if kind == "arrays":
        x, y = load_iris(return_X_y=True)
        np.savez(folder / "a.npz", inputs=x, targets=y)
        return folder / "a.npz", Arrays(str(folder / "a.npz"))
    if kind == "text":
        (folder / "a.txt").write_text("hello " * 999)
        return folder / "a.txt", Text(str(folder / "a.txt"), 8)
    if kind == "tokens":
        (folder / "a.txt").write_text("hello " * 999)
        tokenize(folder / "a.txt", folder / "out", Bytes())
        return folder / "out" / "shard-00000.bin", Tokens(str(folder / "out"), 8)
    IRIS.to_parquet(folder / "a.parquet")
    return folder / "a.parquet", Parquet(str(folder / "a.parquet"), "target", memory_mb=0.0)


@pytest.mark.parametrize("kind", ["arrays", "text", "tokens", "parquet"])
@pytest.mark.parametrize("change", ["size", "time", "gone"])
def test_a_file_that_changes_while_a_run_reads_it_is_named(tmp_path, monkeypatch, kind, change):
    monkeypatch.setattr("descent.data.arrays.LARGE", 1)
    monkeypatch.setattr("descent.data.text.LARGE", 1)
    monkeypatch.setattr("descent.data.identity._EVERY_S", 0.0)
    file, data = mapped(kind, tmp_path)
    train, _ = hold_out(data, 0.1, 0)
    feed = Feed(train, SampleOrder.of(train, 4, 0), CPU)
    feed.prepare(1, [(0, (0, 4))], 4)
    feed.fetch(1, 0, 4)
    if change == "gone":
        file.unlink()
    elif change == "time":
        os.utime(file, ns=(0, 0))
    else:
        # The next batch may be read from the mapped file at this moment: the file must not shrink.
        with file.open("ab") as grows:
            grows.write(b"more")
    word = "is gone" if change == "gone" else "has changed"
    with pytest.raises(DataError, match=rf"{file.name} {word} while the run was reading it: put it back"):
        feed.prepare(2, [(0, (0, 4))], 4)
