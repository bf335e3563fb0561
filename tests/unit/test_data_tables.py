"""Parquet and Hugging Face data sets against pandas and the library itself."""

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits, load_iris

from descent.data.bad_records import BadRecords, read_good
from descent.data.hugging_face import HuggingFace
from descent.data.parquet import Parquet
from descent.data.sharded_sets import make_index
from descent.data.shards import read_index
from descent.errors import DataError
from descent.storage import open_store
from descent.training.input.feed import Feed
from descent.training.input.sampling import SampleOrder
from tests.unit.test_data_refusals import refusal

IRIS = load_iris(as_frame=True).frame


def quiet(*_: object) -> None:
    """No progress."""


@pytest.fixture
def iris(tmp_path):
    """Iris in one file, in row groups of 20."""
    file = tmp_path / "iris.parquet"
    IRIS.to_parquet(file, row_group_size=20)
    return file


@pytest.mark.parametrize("memory_mb", [1024.0, 0.0])
@settings(deadline=None, max_examples=20)
@given(chosen=st.lists(st.integers(0, 149), min_size=1, max_size=40))
def test_rows_of_a_table_in_memory_and_by_row_groups(tmp_path_factory, memory_mb, chosen):
    file = tmp_path_factory.mktemp("p") / "iris.parquet"
    IRIS.to_parquet(file, row_group_size=20)
    data = Parquet(str(file), "target", memory_mb=memory_mb)
    assert data.in_memory == (memory_mb > 0)
    inputs, targets = data.gather(np.array(chosen))
    np.testing.assert_array_equal(inputs, IRIS.iloc[chosen, :4].to_numpy(np.float32))
    np.testing.assert_array_equal(targets, IRIS.iloc[chosen, 4])
    assert (data.num_outputs, data.input_shape, len(data)) == (3, (4,), 150)
    assert inputs.dtype == torch.float32 and targets.dtype == torch.int64


def test_a_folder_of_files_is_one_table_with_an_index_or_without(tmp_path, iris):
    for number, rows in enumerate((slice(0, 50), slice(50, 90), slice(90, 150))):
        IRIS.iloc[rows].to_parquet(tmp_path / f"part-{number}.parquet", row_group_size=30)
    iris.unlink()
    data = Parquet(str(tmp_path), "target", memory_mb=0.0)
    make_index(tmp_path, quiet)
    index = read_index(open_store(str(tmp_path)), "parquet")
    assert index.about["row_groups"] == [[30, 20], [30, 10], [30, 30]]
    indexed = Parquet(str(tmp_path), "target", memory_mb=0.0)
    everything = np.random.default_rng(0).permutation(150)
    expected = IRIS.iloc[everything, :4].to_numpy(np.float32)
    for made in (data, indexed):
        np.testing.assert_array_equal(made.gather(everything)[0], expected)
        assert made.layout.starts.tolist() == [0, 30, 50, 80, 90, 120, 150]


def test_by_row_groups_an_epoch_has_each_row_once_and_decodes_each_group_once(iris):
    data = Parquet(str(iris), "target", memory_mb=0.0, window=40)
    decoded = []
    read = data._read
    data._read = lambda group: decoded.append(group) or read(group)  # type: ignore[method-assign]
    order = SampleOrder.of(data, 30, seed=1)
    feed = Feed(data, order, torch.device("cpu"))
    seen = []
    for step in range(1, 6):
        feed.prepare(step, [(0, (0, 30))], 30)
        inputs, _ = feed.fetch(step, 0, 30)
        seen += inputs.tolist()
    rows = IRIS.iloc[:, :4].to_numpy(np.float32).tolist()
    assert sorted(seen) == sorted(rows)
    assert seen != rows
    feed.forget()
    assert sorted(set(decoded)) == list(range(8))
    assert len(decoded) <= 12, "a window's groups are decoded once"


def test_columns_text_classes_values_and_lists(tmp_path):
    table = IRIS.assign(species=[("setosa", "versicolor", "virginica")[i] for i in IRIS.target], wide=IRIS.target + 5.5)
    file = str(tmp_path / "t.parquet")
    table.to_parquet(file)
    two = Parquet(file, "species", features=["petal width (cm)", "sepal width (cm)"])
    assert two.class_names == ("setosa", "versicolor", "virginica")
    inputs, targets = two.gather(np.array([0, 149]))
    np.testing.assert_allclose(inputs[:, 0], table["petal width (cm)"].iloc[[0, 149]])
    assert targets.tolist() == [0, 2]
    values = Parquet(file, "wide", features=["target"])
    assert values.gather(np.array([149]))[1].tolist() == [[7.5]]
    assert (values.num_outputs, values.targets_are) == (1, "values")
    pixels, labels = load_digits(return_X_y=True)
    lists = pa.table({"pixels": list(pixels.astype(np.uint8)), "label": labels})
    pq.write_table(lists, tmp_path / "digits.parquet", row_group_size=500)
    images = Parquet(str(tmp_path / "digits.parquet"), "label", shape=[1, 8, 8])
    got, _ = images.gather(np.array([1796, 3]))
    np.testing.assert_array_equal(got[:, 0], pixels[[1796, 3]].reshape(2, 8, 8))
    assert images.num_outputs == 10


@pytest.mark.parametrize("memory_mb", [1024.0, 0.0])
def test_a_nan_and_an_empty_cell_are_bad_records(tmp_path, memory_mb):
    table = IRIS.copy()
    table.iloc[47, 1] = np.nan
    table.iloc[90, 2] = np.inf
    file = str(tmp_path / "t.parquet")
    table.to_parquet(file, row_group_size=20)
    if memory_mb:
        assert "row group 2, row 7 (from 0): holds NaN" in refusal(Parquet, file, "target")
    data = Parquet(file, "target", memory_mb=memory_mb, on_error="skip")
    with pytest.raises(BadRecords) as caught:
        data.gather(np.array([3, 47, 90]))
    assert caught.value.rows == [1, 2]
    assert "t.parquet, row group 2, row 7 (from 0): holds NaN, infinity or a number beyond float32" in str(caught.value)
    (inputs, _), count = read_good(data.gather, np.array([3, 47, 90]), 150, "skip")
    expected = IRIS.iloc[[3, 48, 91], :4].to_numpy(np.float32)
    np.testing.assert_array_equal(inputs, expected)
    assert count == 2


def test_what_is_wrong_with_a_table_is_named(tmp_path, iris):
    assert "data.path is not set" in refusal(Parquet)
    assert "data.target is not set" in refusal(Parquet, str(iris))
    assert "none.parquet doesn't exist" in refusal(Parquet, str(tmp_path / "none.parquet"), "x")
    assert "no column 'x'; there are sepal length (cm)" in refusal(Parquet, str(iris), "x")
    assert "holds 'target', which is data.target" in refusal(Parquet, str(iris), "target", features=["target"])
    assert "data.shape=[2, 3]: takes 6 values, a row has 4" in refusal(Parquet, str(iris), "target", shape=[2, 3])
    assert "class 2 is not below num_outputs=2" in refusal(Parquet, str(iris), "target", num_outputs=2)
    (tmp_path / "no").mkdir()
    assert "no *.parquet file there" in refusal(Parquet, str(tmp_path / "no"), "x")
    (tmp_path / "no" / "x.parquet").write_bytes(iris.read_bytes()[:-9])
    assert "is not a Parquet file" in refusal(Parquet, str(tmp_path / "no"), "x")
    mixed = pd.DataFrame({"a": [[1.0], [1.0, 2.0]], "t": [0, 1], "when": pd.Timestamp("2020-01-01")})
    mixed.to_parquet(tmp_path / "mixed.parquet")
    where = str(tmp_path / "mixed.parquet")
    assert "column 'a': has lists of different lengths" in refusal(Parquet, where, "t", ["a"])
    assert "column 'when': is of type timestamp" in refusal(Parquet, where, "t", ["when"])
    assert "'when': is of type timestamp" in refusal(Parquet, where, "when", ["t"])
    pd.DataFrame({"a": [1.0, 2.0], "t": [0, -1]}).to_parquet(tmp_path / "minus.parquet")
    assert "row 1 (from 0): -1 is not a class" in refusal(Parquet, str(tmp_path / "minus.parquet"), "t")


def test_a_second_file_with_other_columns_is_refused(tmp_path):
    IRIS.to_parquet(tmp_path / "a.parquet")
    IRIS.rename(columns={"target": "other"}).to_parquet(tmp_path / "b.parquet")
    assert "b.parquet: its columns are not those of" in refusal(Parquet, str(tmp_path), "target")


# --- Hugging Face ---


@pytest.fixture
def saved(tmp_path):
    pixels, labels = load_digits(return_X_y=True)
    features = datasets.Features(
        {
            "image": datasets.Array2D((8, 8), "uint8"),
            "label": datasets.ClassLabel(10),
            "grade": datasets.Value("float32"),
            "name": datasets.Value("string"),
        }
    )
    rows = {
        "image": pixels[:300].reshape(-1, 8, 8).astype(np.uint8),
        "label": labels[:300],
        "grade": pixels[:300].mean(1),
        "name": ["x"] * 300,
    }
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.save_to_disk(tmp_path / "one")
    whole.train_test_split(0.2, seed=0).save_to_disk(tmp_path / "two")
    return tmp_path, pixels[:300], labels[:300]


def test_a_saved_data_set_gives_its_columns(saved):
    folder, pixels, labels = saved
    data = HuggingFace(str(folder / "one"), scale=1 / 16)
    chosen = np.array([299, 5, 5])
    inputs, targets = data.gather(chosen)
    np.testing.assert_allclose(inputs[:, 0], pixels[chosen].reshape(-1, 8, 8) / 16)
    np.testing.assert_array_equal(targets, labels[chosen])
    assert (data.num_outputs, data.input_shape, len(data)) == (10, (1, 8, 8), 300)
    tokens = HuggingFace(str(folder / "one"))
    assert tokens.gather(chosen)[0].dtype == torch.int64
    values = HuggingFace(str(folder / "one"), target="grade")
    np.testing.assert_allclose(values.gather(chosen)[1][:, 0], pixels[chosen].mean(1), rtol=1e-6)
    assert values.num_outputs == 1


def test_a_saved_dict_needs_its_part_and_names_what_there_is(saved):
    folder, _, _ = saved
    assert len(HuggingFace(str(folder / "two"), part="test")) == 60
    assert "has the parts train, test; name one" in refusal(HuggingFace, str(folder / "two"))
    assert "has no parts; set it to null" in refusal(HuggingFace, str(folder / "one"), part="train")
    assert "no column 'x'; there are image, label" in refusal(HuggingFace, str(folder / "one"), target="x")
    assert "a column gives" in refusal(HuggingFace, str(folder / "one"), input="name")
    assert "can't be loaded" in refusal(HuggingFace, str(folder))
    assert "doesn't exist" in refusal(HuggingFace, str(folder / "none"))
    with pytest.raises(DataError, match=r"data\.path is not set"):
        HuggingFace()
