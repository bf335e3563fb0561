"""Numbers beyond float32, rows to skip, files that are no data: refused by name, or bad records."""

import os
import socket
import struct
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_iris

from descent.config import compose
from descent.data.arrays import Arrays
from descent.data.bad_records import BadRecords
from descent.data.csv_file import Csv
from descent.data.idx import IdxFolder
from descent.data.images import Images
from descent.data.map_style import MapStyle
from descent.data.parquet import Parquet
from descent.data.sharded_sets import make_index
from descent.data.splits import split_indices
from descent.data.text import Text, text_files
from descent.data.tokenize import Bytes, tokenize
from descent.data.tokens import Tokens
from descent.training.input.feed import Feed
from descent.training.plan import build_data
from tests.unit.data_refusal import refusal
from tests.unit.test_data import write_digits_as_idx
from tests.unit.test_data_images import png
from tests.unit.test_data_tokens import write_tokens

CPU = torch.device("cpu")
X, Y = load_iris(return_X_y=True)
IRIS = load_iris(as_frame=True).frame
NAMES = list(IRIS.columns)


def quiet(*_: object) -> None:
    """No progress."""


def with_value(row: int, column: int, value: float) -> np.ndarray:
    changed = X.copy()
    changed[row, column] = value
    return changed


# --- beyond float32 ---


@pytest.mark.parametrize("value", [1e39, -1e39])
def test_a_number_beyond_float32_in_an_array_is_refused_by_row_and_column(tmp_path, value):
    np.savez(tmp_path / "a.npz", inputs=with_value(7, 2, value), targets=Y)
    message = refusal(Arrays, str(tmp_path / "a.npz"))
    assert f"[inputs], row 7 (from 0): holds {value} in column 2, beyond float32 (3.4e+38)" in message
    np.savez(tmp_path / "b.npz", inputs=X, targets=with_value(9, 0, value)[:, 0])
    assert f"[targets], row 9 (from 0): holds {value}, beyond float32" in refusal(Arrays, str(tmp_path / "b.npz"))


def test_a_scale_that_takes_numbers_beyond_float32_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", inputs=with_value(3, 1, 1e30), targets=Y)
    assert Arrays(str(tmp_path / "a.npz"))[3][0][1] == np.float32(1e30)
    assert "row 3 (from 0): holds 1e+30 in column 1" in refusal(Arrays, str(tmp_path / "a.npz"), scale=1e10)


def test_a_number_beyond_float32_in_a_table_is_refused_by_row_and_column(tmp_path):
    file = tmp_path / "a.csv"
    IRIS.assign(**{NAMES[1]: with_value(7, 1, 1e39)[:, 1]}).to_csv(file, index=False)
    message = refusal(Csv, str(file), "target", standardize=False)
    assert f"{file}, row 9, column 'sepal width (cm)': value '1e+39' is beyond float32 (3.4e+38)" in message
    assert Csv(str(file), "target").inputs.isfinite().all(), "standardized, it is a number like any other"
    target = refusal(Csv, str(file), "sepal width (cm)", ["target"], targets_are="values")
    assert "row 9, column 'sepal width (cm)': value '1e+39' is beyond float32" in target
    IRIS.assign(**{NAMES[1]: with_value(7, 1, 1e300)[:, 1]}).to_csv(file, index=False)
    assert "column 'sepal width (cm)': its numbers are too large to be standardized" in refusal(
        Csv, str(file), "target"
    )
    IRIS.assign(**{NAMES[1]: with_value(7, 1, 1e39)[:, 1]}).to_parquet(tmp_path / "a.parquet")
    message = refusal(Parquet, str(tmp_path / "a.parquet"), "target")
    assert "a.parquet, row group 0, row 7 (from 0): holds NaN, infinity or a number beyond float32" in message


def test_a_number_beyond_float32_of_a_users_class_is_a_bad_record():
    class Large(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return np.array([1e39 if index == 13 else index], dtype=np.float64), float(index)

    data = MapStyle(Large())
    with pytest.raises(BadRecords, match=r"input of sample 13 of .*Large: holds a number beyond float32") as caught:
        data.gather(np.array([2, 13]))
    assert caught.value.rows == [1]


# --- rows to skip ---


def skipped(*overrides: str) -> Feed:
    config = compose(["data.on_error=skip", "data.holdout=0.2", *overrides]).config
    train, evaluate = build_data(config)
    for data in (train, evaluate):
        feed = Feed(data, None, CPU, on_error="skip")
        inputs, targets = feed.take(np.arange(len(data)))
        assert inputs.isfinite().all() and targets.float().isfinite().all()
    return train


@pytest.mark.parametrize("mapped", [False, True])
def test_bad_rows_of_arrays_are_skipped_where_bad_records_are(tmp_path, mapped, monkeypatch):
    if mapped:
        monkeypatch.setattr("descent.data.arrays.LARGE", 1)
    labels = Y.astype(float)
    labels[5], labels[40] = -1, 1.5
    np.savez(tmp_path / "a.npz", inputs=with_value(7, 2, np.nan), targets=labels)
    spec = ["data=arrays", f"data.path={tmp_path / 'a.npz'}", "data.train.targets_are=classes", "data.test=0.0"]
    skipped(*spec)
    data = Arrays(str(tmp_path / "a.npz"), targets_are="classes", on_error="skip")
    with pytest.raises(BadRecords, match=r"\[targets\], row 5 \(from 0\): label -1\.0 is negative") as caught:
        data.gather(np.array([0, 5, 3, 40]))
    assert caught.value.rows == [1, 3]
    with pytest.raises(BadRecords, match=r"\[inputs\], row 7 \(from 0\): holds"):
        data.gather(np.array([7]))
    feed = Feed(data, None, CPU, on_error="skip")
    got, _ = feed.take(np.array([4, 5, 7, 40]))
    np.testing.assert_array_equal(got, X[[4, 6, 8, 41]].astype(np.float32))
    assert feed.replaced() == 3
    assert data.num_outputs == 3


def test_bad_rows_of_a_table_are_skipped_and_count_in_no_statistic(tmp_path):
    lines = IRIS.to_csv(index=False).splitlines()
    lines[8] = "oops," + lines[8].partition(",")[2]
    lines[20] = lines[20].rpartition(",")[0] + ","
    lines[30] = "1,2"
    file = tmp_path / "a.csv"
    file.write_text("\n".join(lines) + "\n")
    skipped("data=csv", f"data.path={file}", "data.target=target")
    data = Csv(str(file), "target", on_error="skip", holdout=0.2)
    good = np.setdiff1d(np.arange(150), [7, 19, 29])
    inputs, targets = data.gather(good)
    np.testing.assert_array_equal(targets, Y[good])
    train = np.setdiff1d(split_indices(150, 0.2, 0)[0], [7, 19, 29])
    np.testing.assert_allclose(inputs, (X[good] - X[train].mean(0)) / X[train].std(0), atol=1e-5)
    for row, words in ((7, "row 9, column"), (19, "row 21, column 'target': empty cell"), (29, "row 31: 2 columns")):
        with pytest.raises(BadRecords, match=words):
            data[row]


@pytest.mark.parametrize("memory_mb", [1024, 0])
def test_unusable_targets_of_parquet_are_skipped(tmp_path, memory_mb):
    table = IRIS.assign(target=Y.astype(float), name=np.where(np.arange(150) % 2, "odd", "even"))
    table.loc[[3, 77], "target"] = [np.nan, -2.0]
    table.loc[11, "name"] = None
    table.to_parquet(tmp_path / "a.parquet", row_group_size=20)
    path = str(tmp_path / "a.parquet")
    features = NAMES[:4]
    skipped("data=parquet", f"data.path={path}", "data.target=name", f"data.features=[{','.join(map(repr, features))}]")
    data = Parquet(path, "target", features, targets_are="classes", memory_mb=memory_mb, on_error="skip")
    with pytest.raises(BadRecords) as caught:
        data.gather(np.array([0, 3, 77]))
    assert caught.value.rows == [1, 2]
    assert "row group 0, row 3 (from 0), column 'target': has no usable target" in str(caught.value)
    refused = refusal(Parquet, path, "target", features, targets_are="classes", memory_mb=memory_mb)
    assert "row 3 (from 0): has no target" in refused


def test_data_without_one_usable_row_is_refused_with_skip_too(tmp_path):
    np.savez(tmp_path / "a.npz", inputs=np.full((5, 2), np.nan), targets=np.zeros(5, dtype=int))
    assert "no sample can be used: " in refusal(Arrays, str(tmp_path / "a.npz"), on_error="skip")


def test_a_label_out_of_range_in_an_idx_file_is_skipped(tmp_path):
    _, labels = write_digits_as_idx(tmp_path)
    top = int(labels[:300].max())
    assert f"label {top} of sample " in refusal(IdxFolder, str(tmp_path), num_outputs=top)
    data = IdxFolder(str(tmp_path), num_outputs=top, on_error="skip")
    bad = np.flatnonzero(labels[:300] == top)
    with pytest.raises(BadRecords, match=rf"label {top} of sample {bad[0]} \(byte {8 + bad[0]}\)") as caught:
        data.gather(np.arange(300))
    assert caught.value.rows == bad.tolist()
    assert data.labels.max() < top


def test_a_token_beyond_the_vocabulary_is_named_by_its_shard(tmp_path):
    write_tokens(tmp_path, [np.arange(40) % 30, np.arange(40) % 35], "uint16", 31)
    data = Tokens(str(tmp_path), 8)
    assert len(data.gather(np.arange(4))[0]) == 4
    with pytest.raises(
        BadRecords, match=r"/1\.bin: sample 7 has the token 32, which is not below the vocabulary of 31"
    ):
        data.gather(np.array([0, 7]))


# --- files that are no data ---


def test_what_desktops_put_beside_files_is_no_data(tmp_path):
    for name in ("cat", "dog", "__MACOSX", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
        for file in ("1.png", "._1.png", ".DS_Store", "Thumbs.db"):
            (tmp_path / name / file).write_bytes(png(np.zeros((4, 4), np.uint8)) if file == "1.png" else b"junk")
    (tmp_path / ".DS_Store").write_bytes(b"junk")
    data = Images(str(tmp_path))
    assert (data.class_names, len(data)) == (("cat", "dog"), 2)
    for folder in (tmp_path, tmp_path / "cat", tmp_path / "__MACOSX"):
        (folder / "a.txt").write_text("text")
        (folder / "._a.txt").write_text("junk")
    assert text_files(tmp_path, "**/*.txt") == [tmp_path / "a.txt", tmp_path / "cat" / "a.txt"]
    tables = tmp_path / "tables"
    tables.mkdir()
    IRIS.to_parquet(tables / "a.parquet")
    (tables / "._a.parquet").write_bytes(b"junk")
    assert len(Parquet(str(tables), "target")) == 150
    assert [shard.file for shard in make_index(tables, quiet).shards] == ["a.parquet"]


@pytest.mark.timeout(60)
def test_pipes_sockets_and_devices_are_refused_and_not_waited_for(tmp_path):
    pipe, folder = tmp_path / "pipe", tmp_path / "images"
    os.mkfifo(pipe)
    (folder / "a").mkdir(parents=True)
    os.mkfifo(folder / "a" / "1.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for place, words in ((pipe, "a named pipe"), (tmp_path / "socket", "a socket"), ("/dev/zero", "a device")):
            message = f"{place} is {words}, which can't be read as data"
            assert message in refusal(Csv, str(place), "y")
            assert message in refusal(Arrays, str(place))
            assert message in refusal(Arrays, inputs=str(place), targets=str(place))
            assert message in refusal(Text, str(place))
            assert message in refusal(tokenize, Path(place), tmp_path / "out", Bytes())
        assert "a/1.png (sample 0): is not a regular file" in refusal(Images, str(folder))
        (folder / "a" / "0.png").write_bytes(png(np.zeros((4, 4), np.uint8)))
        with pytest.raises(BadRecords, match="is not a regular file"):
            Images(str(folder), processes=1).gather(np.array([0, 1]))
    os.mkfifo(tmp_path / "x.parquet")
    assert "x.parquet is a named pipe" in refusal(Parquet, str(tmp_path / "x.parquet"), "y")
    assert "x.parquet is a named pipe" in refusal(Parquet, str(tmp_path), "y")


def test_a_compressed_array_is_refused_by_the_size_that_it_unpacks_to(tmp_path):
    file = tmp_path / "a.npz"
    np.savez_compressed(file, inputs=np.zeros((1000, 1000), np.float32), targets=np.zeros(1000, np.int64))
    assert file.stat().st_size < 20_000
    message = refusal(Arrays, str(file), max_mb=2)
    assert "[inputs]: unpacks to 4 MB, more than data.max_mb=2" in message
    assert len(Arrays(str(file), max_mb=4)) == 1000


def test_an_array_whose_header_promises_more_than_its_file_is_refused_before_memory_is_asked_for(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for key in ("inputs", "targets"):
            text = "{'descr': '<f8', 'fortran_order': False, 'shape': (2000000000000,), }"
            header = text.encode().ljust(117) + b"\n"
            archive.writestr(f"{key}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    message = refusal(Arrays, str(tmp_path / "a.npz"))
    assert "[inputs]: its header promises 16,000,000,000,000 bytes, the archive has 128: it is broken" in message


# --- tables ---


def test_one_column_of_two_types_in_two_files_is_refused_by_both(tmp_path):
    IRIS.to_parquet(tmp_path / "a.parquet")
    IRIS.assign(target=IRIS.target.map(str)).to_parquet(tmp_path / "b.parquet")
    message = refusal(Parquet, str(tmp_path), "target")
    assert "b.parquet, column 'target': is of type " in message and "string" in message
    assert "a.parquet it is of type int64" in message
    IRIS.assign(target=IRIS.target.astype("int8")).to_parquet(tmp_path / "b.parquet")
    assert len(Parquet(str(tmp_path), "target")) == 300, "numbers of another width are numbers"


def test_a_tab_may_be_typed_as_backslash_t(tmp_path):
    IRIS.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    for typed in ("\t", "\\t"):
        assert Csv(str(tmp_path / "a.tsv"), "target", delimiter=typed).input_shape == (4,)
    assert "data.delimiter=';;' must be one character" in refusal(Csv, str(tmp_path / "a.tsv"), "y", delimiter=";;")
    assert pd.read_csv(tmp_path / "a.tsv", sep="\t").shape == (150, 5)
