"""Rows of a Hugging Face data set as dicts of columns, with torch's collate function and with their own padding."""

import datasets
import numpy as np
import pytest
import torch

from descent.config import compose
from descent.errors import DataError
from descent.training.input.building import build_data


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    features = datasets.Features(
        {
            "input_ids": datasets.Sequence(datasets.Value("int64")),
            "mask": datasets.Sequence(datasets.Value("int64")),
            "text": datasets.Value("string"),
            "labels": datasets.ClassLabel(names=["bad", "good"]),
        }
    )
    rows = {
        "input_ids": rng.integers(0, 9, (20, 5)).tolist(),
        "mask": [[1] * (1 + i % 5) for i in range(20)],
        "text": [f"text {i}" for i in range(20)],
        "labels": [i % 2 for i in range(20)],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "rows"))
    return tmp_path / "rows", rows


def sets(path, *overrides):
    return build_data(compose(["data=hugging_face_rows", f"data.path={path}", *overrides]).config)


def test_rows_are_dicts_of_the_chosen_columns(folder):
    path, rows = folder
    train, evaluate = sets(path, "data.columns=[input_ids,labels,text]")
    assert (len(train), len(evaluate), train.class_names) == (18, 2, ("bad", "good"))
    train, _ = sets(path, "data.columns=[input_ids,labels,text]", "data.holdout=0")
    batch = train.gather(np.array([3, 0, 19]))
    assert list(batch) == ["input_ids", "labels", "text"]
    assert torch.equal(batch["input_ids"], torch.tensor([rows["input_ids"][i] for i in (3, 0, 19)]))
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["text"] == ["text 3", "text 0", "text 19"]


def test_columns_of_unequal_lengths_go_through_a_collate_function(folder):
    path, _ = folder
    own = ["data.collate._target_=tests.unit.test_hugging_face_rows.padded", "trusted_modules=[tests.unit]"]
    train, _ = sets(path, "data.columns=mask", "data.holdout=0", *own)
    assert train.gather(np.array([0, 3])).tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]


def padded(samples):
    return torch.nn.utils.rnn.pad_sequence([sample["mask"] for sample in samples], batch_first=True)


def test_columns_that_are_not_there_are_refused(folder):
    with pytest.raises(DataError, match="no column 'ids'; there are input_ids, mask, text, labels"):
        sets(folder[0], "data.columns=[ids]")
