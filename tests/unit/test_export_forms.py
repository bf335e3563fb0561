"""Exported networks of any form: several inputs, dicts, dataclasses and Hugging Face's outputs, by name in the archive."""

import dataclasses
import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from descent.errors import TrainingError
from descent.tracking.export import Sample, export_model, pickled_records, predictions_of
from descent.tracking.pyfunc import save_model


@dataclasses.dataclass
class Output:
    logits: Tensor
    penalty: Tensor | None = None
    cache: object = None


Pair = namedtuple("Pair", "near far")


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(one), self.net(other)


class Tabular(nn.Module):
    """Two inputs of different types, as keywords; a dataclass out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(11, 2)

    def forward(self, numbers: Tensor, categories: Tensor, scale: float = 1.0) -> Output:
        features = torch.cat([numbers, self.embedding(categories).flatten(1)], 1)
        return Output(self.head(features) * scale, features.pow(2).mean(1), cache=object())


class OfADict(nn.Module):
    """The whole batch as one dict; a named tuple within a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        image = self.net(batch["image"])
        return {"pair": Pair(image, image + batch["meta"]["shift"][:, None]), "none": None}


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **sizes))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2))


def tokens(n: int = 4, t: int = 6) -> dict[str, Tensor]:
    mask = torch.ones(n, t, dtype=torch.int64)
    mask[0, t // 2 :] = 0
    return {"input_ids": torch.randint(0, 40, (n, t)), "attention_mask": mask}


def forms() -> dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any], list[str]]]:
    """Name -> model, arguments, and the names of the tensors in the archive."""
    torch.manual_seed(0)
    numbers, categories = torch.randn(4, 2), torch.randint(0, 7, (4, 3))
    batch = {"image": torch.randn(4, 4), "meta": {"shift": torch.randn(4)}}
    return {
        "two tensors": (Siamese(), (torch.randn(4, 4), torch.randn(4, 4)), {}, ["one", "other"]),
        "keywords": (Tabular(), (numbers,), {"categories": categories, "scale": 2.0}, ["numbers", "categories"]),
        "a dict": (OfADict(), (batch,), {}, ["batch_image", "batch_meta_shift"]),
        "bert": (bert(), (), tokens(), ["input_ids", "attention_mask"]),
        "gpt2": (gpt2(), (), tokens(), ["input_ids", "attention_mask"]),
    }


def plain(value: Any) -> Any:
    """What the archive should give, from the model's own output, by hand."""
    if isinstance(value, Output):
        return {"logits": value.logits, "penalty": value.penalty}
    if hasattr(value, "logits"):
        return {"logits": value.logits}
    if isinstance(value, dict):
        return {"pair": {"near": value["pair"].near, "far": value["pair"].far}}
    return value


@pytest.mark.parametrize("form", ["two tensors", "keywords", "a dict", "bert", "gpt2"])
def test_the_archive_gives_the_numbers_of_the_model_for_any_number_of_samples(form: str, tmp_path: Path) -> None:
    model, args, kwargs, names = forms()[form]
    sample = Sample.of(model, args, kwargs)
    assert list(sample.tensors) == names
    path = export_model(model.train(), sample, tmp_path)
    assert pickled_records(path) == [] and model.training
    loaded, model = torch.export.load(path).module(), model.eval()
    for count in (1, 3, 8):
        rows = torch.arange(8)[:count] % 4
        some = tree_map(lambda leaf, rows=rows: leaf[rows] if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        given = Sample.of(model, *some)
        with torch.no_grad():
            torch.testing.assert_close(loaded(**given.tensors), plain(model(*some[0], **some[1])))


@pytest.mark.parametrize("form", ["bert", "gpt2"])
def test_texts_may_be_of_another_length_than_the_sample(form: str, tmp_path: Path) -> None:
    model, args, kwargs, _ = forms()[form]
    loaded = torch.export.load(export_model(model, Sample.of(model, args, kwargs), tmp_path)).module()
    longer = tokens(2, 11)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**longer)["logits"], model.eval()(**longer).logits)


def test_an_archive_needs_no_library_of_the_models_own(tmp_path: Path) -> None:
    model, args, kwargs, _ = forms()["bert"]
    path = export_model(model, Sample.of(model, args, kwargs), tmp_path)
    code = (
        "import sys, torch\n"
        f"module = torch.export.load({str(path)!r}).module()\n"
        "ids = torch.ones(2, 6, dtype=torch.int64)\n"
        "print(list(module(input_ids=ids, attention_mask=ids)), 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "['logits'] False"


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(x)
        if x.sum() > 0:  # depends on the values
            return x
        return -x


class InNumpy(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.from_numpy(np.sign(x.numpy())))


class Remembers(Branches):
    """Gives other numbers in each call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Remembers.calls += 1
        return self.net(x) * Remembers.calls


@pytest.mark.parametrize(
    ("model", "line", "reason"),
    [
        (Branches(), "if x.sum() > 0:", "depends on the values in a tensor"),
        (InNumpy(), "return self.net(torch.from_numpy(np.sign(x.numpy())))", "numpy() is not supported"),
        (Remembers(), "", "gives other numbers than the model"),
    ],
)
def test_what_can_not_be_exported_names_the_line_and_the_reason(
    model: nn.Module, line: str, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingError) as caught:
        export_model(model, torch.randn(4, 3), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{type(model).__name__} can't be exported with torch.export: ")
    assert line in message and reason in message and "\n" not in message
    assert "test_export_forms.py, line " in message or not line
    assert "aten" not in capfd.readouterr().err, "no graphs of torch's for a person to read"


def test_arguments_without_a_tensor_are_refused() -> None:
    with pytest.raises(TrainingError, match="its arguments hold no tensor"):
        Sample.of(Branches(), (3,), {})


LOADED = """
import json, sys
import mlflow, numpy as np, pandas as pd

arrays = {name: np.array(values) for name, values in json.load(open("arrays.json")).items()}
model = mlflow.pyfunc.load_model("model")
arrays = {i["name"]: arrays[i["name"]].astype(i["tensor-spec"]["dtype"]) for i in model.metadata.signature.inputs.to_dict()}
frame = pd.DataFrame({name: list(array) for name, array in arrays.items()})
found = [{k: v.tolist() for k, v in model.predict(given).items()} for given in ([arrays, frame] if "table" in sys.argv else [arrays])]
assert not {"descent", "transformers"} & set(sys.modules)
print(json.dumps([found, list(arrays)]))
"""


@pytest.mark.parametrize("form", ["bert", "keywords"])
def test_mlflow_predicts_from_a_dict_of_arrays_and_from_a_table(form: str, tmp_path: Path) -> None:
    """From a table only where the rows have one length: MLflow's own rule."""
    model, args, kwargs, names = forms()[form]
    sample = Sample.of(model.eval(), args, kwargs)
    save_model(model, sample, predictions_of(model, sample), tmp_path / "model")
    (tmp_path / "arrays.json").write_text(json.dumps({name: t.tolist() for name, t in sample.tensors.items()}))
    words = ["table"] if form == "keywords" else []
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADED, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found, columns = json.loads(done.stdout.splitlines()[-1])
    assert columns == names and len(found) == 1 + len(words)
    with torch.no_grad():
        expected = plain(model(*args, **kwargs))
    for outputs in found:
        for name, values in outputs.items():
            np.testing.assert_allclose(values, expected[name].numpy(), rtol=1e-4, atol=1e-5)


def test_a_single_input_with_several_outputs_takes_an_array_and_a_table(tmp_path: Path) -> None:
    class Two(Branches):
        def forward(self, x: Tensor) -> Output:
            return Output(self.net(x), x.sum(1))

    import mlflow

    model, x = Two().eval(), torch.randn(4, 3)
    sample = Sample.of(model, (x,), {})
    loaded = mlflow.pyfunc.load_model(str(save_model(model, sample, predictions_of(model, sample), tmp_path / "model")))
    for given in (x.numpy(), pd.DataFrame(x.numpy())):
        found = loaded.predict(given)
        np.testing.assert_allclose(found["logits"], model(x).logits.detach().numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["penalty"], x.sum(1).numpy(), rtol=1e-5, atol=1e-6)
