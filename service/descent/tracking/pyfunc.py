"""The MLflow model of a run: a pyfunc 'model from code', which is a short script and the exported network beside it.

It needs mlflow, torch and numpy to load, not this package. MLflow's own pytorch flavour can't be used for that: it
writes the sample inputs with pickle, and insists on reading them.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from descent.tracking.export import ARCHIVE, Sample, exported, input_shapes, save_program
from descent.tracking.tracker import Point, Tracker

# Travels inside the MLflow model: keep it free of imports from this package.
_PREDICT_SCRIPT = '''"""Loads the exported network beside it and predicts with it, on the CPU."""

import json

import mlflow
import numpy as np
import torch


def as_tensor(values, dtype):
    """An array, a list, or a table's column (whose cells may be arrays), as a tensor."""
    array = np.asarray(values.to_numpy() if hasattr(values, "to_numpy") else values)
    if array.dtype == object:
        array = np.stack([np.asarray(cell) for cell in array])
    return torch.from_numpy(np.array(array)).to(getattr(torch, dtype))


def as_columns(table, columns, categories):
    """A table's columns as float64 [n, columns]; of a category, the number of each text, and -1 for an unknown one."""
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(f"the table has no column {missing[0]!r}; the model takes {', '.join(columns)}")
    return np.stack([as_numbers(table[name], categories.get(name)) for name in columns], axis=1)


def as_numbers(column, texts):
    if texts is None:
        return np.asarray(column, dtype="float64")
    number_of = {text: number for number, text in enumerate(texts)}
    by_value = {}  # pandas reads 01 as the number 1
    for text, number in number_of.items():
        try:
            by_value[float(text)] = number
        except ValueError:
            pass
    return np.array(
        [number_of.get(c.strip(), -1) if isinstance(c, str) else by_value.get(c, -1) for c in column], dtype="float64"
    )


def as_arrays(output):
    if isinstance(output, torch.Tensor):
        return output.numpy()
    if isinstance(output, dict):
        return {name: as_arrays(value) for name, value in output.items()}
    return type(output)(as_arrays(value) for value in output)


class ExportedNetwork(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.network = torch.export.load(context.artifacts["network"]).module()
        with open(context.artifacts["inputs"]) as file:
            self.inputs = json.load(file)

    def predict(self, context, model_input: np.ndarray, params=None):
        dtypes = self.inputs["dtypes"]
        with torch.no_grad():
            if self.inputs["by_name"]:
                tensors = {name: as_tensor(model_input[name], dtype) for name, dtype in dtypes.items()}
                return as_arrays(self.network(**tensors))
            (name, dtype), = dtypes.items()
            given = model_input[name] if isinstance(model_input, dict) else model_input
            if self.inputs["categories"]:
                given = as_columns(given, self.inputs["columns"], self.inputs["categories"])
            return as_arrays(self.network(as_tensor(given, dtype)))


mlflow.models.set_model(ExportedNetwork())
'''


def save_model(
    model: nn.Module,
    sample: Tensor | Sample,
    predictions: Any,
    out_dir: Path,
    *,
    preprocessing: nn.Module | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write an MLflow model (new directory `out_dir`) with signature and input example.

    sample: the arguments of n >= 1 samples, or the one tensor [n, …] that the model takes. predictions: the model's
    output for them, tensors in tuples, lists and dicts.
    With `preprocessing`, `sample` is what that takes, so `predict` gets the numbers as the data's files have
    them. `class_names`, by number, are in the model's metadata.

    `predict` takes an array or a table where the model takes one tensor, else a dict of arrays or a table with the
    names of the sample as columns; it gives arrays in the form of the model's output. Where the preprocessing has
    categories, `predict` takes a table with the columns of the data's file, texts as they are there.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    if isinstance(sample, Tensor):
        sample = Sample.of(model, (sample,), {})
    program = exported(model, sample, preprocessing)
    arrays = {name: tensor.numpy() for name, tensor in sample.tensors.items()}
    by_name, shapes = not sample.is_one_tensor, input_shapes(program)
    specs = [
        TensorSpec(array.dtype, shape, name if by_name else None)
        for (name, array), shape in zip(arrays.items(), shapes, strict=True)
    ]
    few: Any = {name: array[:2] for name, array in arrays.items()} if sample.num_rows else arrays
    few = few if by_name else next(iter(few.values()))
    columns, categories = getattr(preprocessing, "names", ()), getattr(preprocessing, "categories", {})
    schema = Schema(specs)
    if categories:
        few = _as_table(few, columns, categories)
        # Of any type, because pandas has whole numbers as integers and a signature refuses these for floats.
        schema = Schema([ColSpec(AnyType(), name) for name in columns])
    outputs = _output_specs(predictions)
    with tempfile.TemporaryDirectory() as temporary:
        script, inputs = Path(temporary) / "predict.py", Path(temporary) / "inputs.json"
        script.write_text(_PREDICT_SCRIPT)
        dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in sample.tensors.items()}
        known = {"columns": list(columns), "categories": {name: list(texts) for name, texts in categories.items()}}
        inputs.write_text(json.dumps({"by_name": by_name, "dtypes": dtypes, **known}))
        archive = save_program(program, Path(temporary) / ARCHIVE, model)
        mlflow.pyfunc.save_model(
            path=out_dir,
            python_model=str(script),
            artifacts={"network": str(archive), "inputs": str(inputs)},
            signature=ModelSignature(schema, None if outputs is None else Schema(outputs)),
            input_example=few,
            metadata={"class_names": list(class_names)} if class_names else None,
            # given, because inferring them means loading the model in another process
            pip_requirements=[
                f"mlflow=={mlflow.__version__}",
                f"torch=={torch.__version__.split('+')[0]}",
                f"numpy=={np.__version__}",
            ],
        )
    for cache in list(out_dir.rglob("__pycache__")):
        shutil.rmtree(cache)
    return out_dir


def _as_table(rows: Any, columns: Sequence[str], categories: Mapping[str, Sequence[str]]) -> Any:
    """Raw rows [n, columns] as the table that they come from; a category that is unknown has no text."""
    import pandas as pd

    table = pd.DataFrame(rows, columns=list(columns))
    for name, texts in categories.items():
        table[name] = [texts[int(number)] if number >= 0 else "" for number in table[name]]
    return table


def _output_specs(predictions: Any) -> list[Any] | None:
    """The output's arrays for the signature; None for a nested output, which a signature has no words for."""
    from mlflow.types import TensorSpec

    def spec(tensor: Tensor, name: str | None) -> Any:
        array = tensor.detach().cpu()
        array = array.float() if array.dtype in (torch.float16, torch.bfloat16) else array
        return TensorSpec(array.numpy().dtype, (-1, *array.shape[1:]) if array.dim() else (), name)

    if isinstance(predictions, Tensor):
        return [spec(predictions, None)]
    named = predictions if isinstance(predictions, dict) else {f"output_{i}": v for i, v in enumerate(predictions)}
    if all(isinstance(value, Tensor) and value.dim() for value in named.values()):
        return [spec(value, name) for name, value in named.items()]
    return None


def log_model(
    tracker: Tracker,
    model: nn.Module,
    sample: Tensor | Sample,
    predictions: Any,
    name: str,
    step: int,
    points: Mapping[str, Point],
    *,
    preprocessing: nn.Module | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Keep the trained model with the run: `mlflow.pyfunc.load_model("runs:/<run_id>/<name>")`.

    `step`, `points`: see `Tracker.log_model`. The export happens here and now and takes seconds; the
    tracker uploads in the background. The other arguments: see `save_model`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        directory = save_model(
            model,
            sample,
            predictions,
            Path(temporary) / name,
            preprocessing=preprocessing,
            class_names=class_names,
        )
        tracker.log_model(directory, name, step, points)
