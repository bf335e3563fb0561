"""What a data set does to its source's numbers travels with the exported model, and so do the class names."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from torch import nn

from descent.data.arrays import Arrays
from descent.data.breast_cancer import BreastCancer
from descent.data.csv_file import Csv
from descent.data.digits import Digits
from descent.data.idx import IdxFolder
from descent.data.images import Images
from descent.data.splits import hold_out
from descent.tracking.pyfunc import save_model
from tests.unit.test_data import write_digits_as_idx

IRIS = load_iris(as_frame=True)
TABLE = IRIS.frame.assign(species=IRIS.target_names[IRIS.target]).drop(columns="target")


def of_kind(kind: str, folder):
    """(data set, its source's raw inputs for all samples, as NumPy reads them)."""
    if kind == "csv":
        TABLE.to_csv(folder / "iris.csv", index=False)
        return Csv(str(folder / "iris.csv"), "species"), pd.read_csv(folder / "iris.csv").iloc[:, :4].to_numpy()
    if kind == "breast_cancer":
        return BreastCancer(), load_breast_cancer().data
    if kind == "idx":
        pixels, _ = write_digits_as_idx(folder)
        return IdxFolder(str(folder), mean=0.3, std=0.7), pixels[:300, None].astype(np.uint8)
    if kind == "images":
        pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
        (folder / "a").mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / "a" / f"{i}.png")
        return Images(str(folder), mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0]), pixels.transpose(0, 3, 1, 2)
    x, y = load_digits(return_X_y=True)
    x = x.astype(np.uint8)
    np.savez(folder / "a.npz", inputs=x, targets=y)
    return Arrays(str(folder / "a.npz"), scale=1 / 16), x


@pytest.mark.parametrize("kind", ["csv", "breast_cancer", "idx", "images", "arrays"])
def test_preprocessing_turns_the_sources_numbers_into_the_inputs_and_back(kind, tmp_path):
    data, raw = of_kind(kind, tmp_path)
    inputs, _ = data.gather(np.arange(len(data)))
    torch.testing.assert_close(
        data.preprocessing(torch.from_numpy(np.ascontiguousarray(raw))), inputs, rtol=1e-6, atol=1e-6
    )
    undone = data.preprocessing.undo(inputs).numpy()
    assert undone.dtype == raw.dtype
    np.testing.assert_allclose(undone, raw, rtol=1e-5, atol=1e-6)
    part, _ = hold_out(data, 0.2, 0)
    assert part.preprocessing is data.preprocessing and part.class_names == data.class_names


def test_a_column_of_large_numbers_keeps_its_small_differences(tmp_path):
    times = 1_700_000_000 + np.arange(60.0)
    pd.DataFrame({"time": times, "y": np.arange(60) % 2}).to_csv(tmp_path / "a.csv", index=False)
    data = Csv(str(tmp_path / "a.csv"), "y")
    exported = data.preprocessing(torch.from_numpy(times[:, None]))
    assert len(exported.unique()) == 60
    assert torch.equal(exported, data.inputs)


def test_data_that_is_used_as_its_source_has_it_needs_none(tmp_path):
    TABLE.to_csv(tmp_path / "iris.csv", index=False)
    assert Csv(str(tmp_path / "iris.csv"), "species", standardize=False).preprocessing is None
    assert Digits().preprocessing is None


def test_predict_takes_the_files_own_rows_and_the_model_knows_its_classes(tmp_path):
    TABLE.to_csv(tmp_path / "iris.csv", index=False)
    data = Csv(str(tmp_path / "iris.csv"), "species")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, _ = data.gather(np.arange(4))
    raw = data.preprocessing.undo(inputs)
    with torch.no_grad():
        predictions, expected = model(inputs), model(data.inputs)
    save_model(
        model, raw, predictions, tmp_path / "model", preprocessing=data.preprocessing, class_names=data.class_names
    )
    code = (
        "import json, mlflow, pandas as pd\n"
        "model = mlflow.pyfunc.load_model('model')\n"
        "table = pd.read_csv('iris.csv').iloc[:, :4]\n"
        "found = [model.predict(table).tolist(), model.predict(table.to_numpy()).tolist()]\n"
        "print(json.dumps([found, model.metadata.metadata]))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, metadata = json.loads(done.stdout.splitlines()[-1])
    for values in found:
        np.testing.assert_allclose(values, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert metadata == {"class_names": ["setosa", "versicolor", "virginica"]}


def test_predict_takes_a_table_with_texts_as_the_file_has_them(tmp_path):
    table = pd.DataFrame(
        {
            "city": ["Rome", "Oslo", "Bonn"] * 20,
            "area": range(60),
            "zone": [f"{i % 4:02d}" for i in range(60)],
            "price": np.linspace(0.5, 9.5, 60),
        }
    )
    table.to_csv(tmp_path / "houses.csv", index=False)
    data = Csv(str(tmp_path / "houses.csv"), "price", categories=["zone"])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*data.input_shape, 8), nn.Tanh(), nn.Linear(8, 1))
    inputs, _ = data.gather(np.arange(4))
    unknown = data.inputs[:1].clone()
    unknown[:, :3] = 0  # a city that no row of the file has
    with torch.no_grad():
        predictions, expected = model(inputs), model(torch.cat([data.inputs, unknown]))
    raw = data.preprocessing.undo(inputs)
    save_model(model, raw, predictions, tmp_path / "model", preprocessing=data.preprocessing)
    code = (
        "import json, mlflow, pandas as pd\n"
        "model = mlflow.pyfunc.load_model('model')\n"
        "table = pd.read_csv('houses.csv')\n"
        "table = pd.concat([table, table[:1].assign(city='Atlantis')])\n"
        "found = [model.predict(table).tolist(), model.predict(table.astype({'zone': str, 'area': float})).tolist()]\n"
        "try:\n    model.predict(table.drop(columns='city'))\nexcept Exception as error:\n    found.append(str(error))\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    numbers, texts, refused = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(numbers, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert texts != numbers, "'0' is not the zone '00': texts are compared as they are"
    assert "city" in refused
