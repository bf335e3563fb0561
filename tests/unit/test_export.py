"""Exported networks: the same numbers, any batch size, nothing pickled."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from descent.errors import TrainingError
from descent.tracking.export import export_model, pickled_records
from descent.tracking.pyfunc import save_model


class TinyLanguageModel(nn.Module):
    """Integers in, tied embedding, [n, time, vocabulary] out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embedding(tokens)))


def networks():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
    dense(torch.randn(8, 8, 8))  # moves the running statistics
    image = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return {
        "dense": (dense, torch.randn(3, 8, 8)),
        "image": (image, torch.randn(2, 1, 9, 9)),
        "tokens": (TinyLanguageModel(), torch.randint(0, 20, (4, 6))),
    }


@pytest.mark.parametrize("name", ["dense", "image", "tokens"])
def test_the_archive_predicts_the_same_for_any_batch_size(tmp_path, name):
    model, sample = networks()[name]
    model.train()
    path = export_model(model, sample, tmp_path)
    assert model.training
    assert pickled_records(path) == []
    loaded = torch.export.load(path).module()
    model.eval()
    for rows in (1, 2, 7):
        inputs = torch.cat([sample] * 4)[:rows]
        with torch.no_grad():
            torch.testing.assert_close(loaded(inputs), model(inputs))


def test_no_record_of_the_archive_is_a_pickle_or_holds_the_sample(tmp_path):
    model, sample = networks()["dense"]
    path = export_model(model, sample, tmp_path)
    tensors = {tensor.numpy().tobytes() for tensor in model.state_dict().values()}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            content = archive.read(info)
            if "/weights/weight_" in info.filename:
                assert content in tensors  # a tensor's own bytes and nothing around them
            else:
                assert content.decode("ascii").isprintable() or content == b"6\n", info.filename
            assert sample.numpy().tobytes() not in content


def test_views_of_one_flat_buffer_are_stored_once_each(tmp_path):
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))
    flat = torch.randn(sum(p.numel() for p in model.parameters()))
    start = 0
    for parameter in model.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    path = export_model(model, torch.randn(2, 32), tmp_path)
    assert path.stat().st_size < 3 * flat.numel() * 4


def test_a_network_in_bfloat16_is_exported_in_float32(tmp_path):
    model = nn.Linear(4, 2).to(torch.bfloat16)
    path = export_model(model, torch.randn(2, 4, dtype=torch.bfloat16), tmp_path)
    assert torch.export.load(path).module()(torch.randn(5, 4)).dtype == torch.float32


def test_what_cannot_be_traced_is_one_clear_line(tmp_path):
    class DependsOnValues(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(TrainingError, match="DependsOnValues can't be exported") as caught:
        export_model(DependsOnValues(), torch.randn(2, 3), tmp_path)
    assert "\n" not in str(caught.value)


FRESH = """
import json, sys
import mlflow, numpy as np
found = []
for directory in sys.argv[1:]:
    model = mlflow.pyfunc.load_model(directory)
    shape = model.metadata.signature.inputs.to_dict()[0]["tensor-spec"]["shape"]
    found.append([shape, model.predict(np.load(directory + ".npy")).tolist()])
assert "descent" not in sys.modules
print(json.dumps(found))
"""


def test_mlflow_loads_it_in_a_fresh_process_without_this_package(tmp_path):
    directories, expected = [], []
    for name, (model, sample) in networks().items():
        model.eval()
        with torch.no_grad():
            predictions = model(sample)
        directory = save_model(model, sample, predictions, tmp_path / name)
        suffixes = {path.suffix for path in directory.rglob("*") if path.is_file()}
        assert suffixes <= {"", ".pt2", ".py", ".json", ".yaml", ".txt"}
        np.save(tmp_path / f"{name}.npy", sample.numpy())
        directories.append(str(directory))
        shape = [-1, -1] if name == "tokens" else [-1, *sample.shape[1:]]  # texts may have any length
        expected.append((shape, predictions.numpy()))
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, *directories],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for (shape, values), (true_shape, truth) in zip(json.loads(done.stdout.splitlines()[-1]), expected, strict=True):
        assert shape == true_shape
        np.testing.assert_allclose(np.array(values), truth, rtol=1e-5, atol=1e-6)


def test_a_single_sample_is_enough(tmp_path):
    model, sample = networks()["dense"]
    path = export_model(model, sample[:1], tmp_path)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(path).module()(sample), model(sample))
