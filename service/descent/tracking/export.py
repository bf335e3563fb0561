"""A trained model as something that others can run without Descent.

`model.pt2` is torch.export's archive: the graph as JSON and each tensor as raw bytes. What
torch would pickle into it is the sample input, which is left out here, and tensor subclasses or
script objects, which are refused; `pickled_records` checks the result. MLflow's own pytorch
flavour can't be used for that: it writes the sample inputs, and insists on reading them.

The MLflow model is a pyfunc 'model from code': a short script and the archive beside it. It
needs mlflow, torch and numpy to load, not this package.
"""

import copy
import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from descent.errors import TrainingError
from descent.tracking import Point, Tracker

ARCHIVE = "model.pt2"

# Travels inside the MLflow model: keep it free of imports from this package.
_PREDICT_SCRIPT = '''"""Loads the exported network beside it and predicts with it, on the CPU."""

import mlflow
import numpy as np
import torch


class ExportedNetwork(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.network = torch.export.load(context.artifacts["network"]).module()

    def predict(self, context, model_input: np.ndarray, params=None):
        with torch.no_grad():
            return self.network(torch.from_numpy(np.array(model_input))).numpy()


mlflow.models.set_model(ExportedNetwork())
'''


def export_model(model: nn.Module, sample: Tensor, out_dir: Path, preprocessing: nn.Module | None = None) -> Path:
    """Write `out_dir/model.pt2`: the network in evaluation mode, on the CPU, in float32.

    `sample`: [n, *input_shape] with n >= 1; the batch dimension of the export is free. With
    `preprocessing`, the archive applies it first, and `sample` is what it takes.
    `model` itself is left as it is. Raises `TrainingError` if torch can't trace the network.
    """
    assert sample.ndim >= 1 and sample.shape[0] >= 1, sample.shape
    network = _on_cpu(model)
    if preprocessing is None:
        sample = _as_input(sample)
    else:
        network = nn.Sequential(copy.deepcopy(preprocessing), network).eval()
    if sample.shape[0] == 1:  # torch.export would take a batch of 1 for a constant
        sample = torch.cat([sample, sample])
    batch = torch.export.Dim("batch")
    try:
        with torch.no_grad():
            program = torch.export.export(network, (sample,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch._dynamo has dozens of kinds
        reason = " ".join(str(error).split())[:300]
        raise TrainingError(
            f"{type(model).__name__} can't be exported with torch.export: {reason}; "
            "its checkpoint is complete all the same"
        ) from error
    # torch.export.save would pickle it, and the sample may be somebody's data
    program.example_inputs = None
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / ARCHIVE
    torch.export.save(program, path)
    _require_no_pickle(path, model)
    return path


def pickled_records(archive: Path) -> list[str]:
    """Names of the records in a .pt2 archive that its loader would unpickle."""
    pickled = []
    with zipfile.ZipFile(archive) as records:
        for info in records.infolist():
            if info.filename.endswith("_config.json"):
                entries = json.loads(records.read(info)).get("config", {})
                pickled += [name for name, entry in entries.items() if entry.get("use_pickle")]
            elif "/sample_inputs/" in info.filename and info.file_size:
                pickled.append(info.filename)
    return pickled


def save_model(
    model: nn.Module,
    sample: Tensor,
    predictions: Tensor,
    out_dir: Path,
    *,
    preprocessing: nn.Module | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write an MLflow model (new directory `out_dir`) with signature and input example.

    `sample`: [n, *input_shape], n >= 1; `predictions`: the model's output for it, [n, ...].
    With `preprocessing`, `sample` is what that takes, so `predict` gets the numbers as the data's files have
    them. `class_names`, by number, are in the model's metadata.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    sample = _as_input(sample) if preprocessing is None else sample.detach().cpu()
    inputs, outputs = sample.numpy(), predictions.detach().cpu().float().numpy()
    signature = ModelSignature(
        inputs=Schema([TensorSpec(inputs.dtype, (-1, *inputs.shape[1:]))]),
        outputs=Schema([TensorSpec(outputs.dtype, (-1, *outputs.shape[1:]))]),
    )
    with tempfile.TemporaryDirectory() as temporary:
        script = Path(temporary) / "predict.py"
        script.write_text(_PREDICT_SCRIPT)
        archive = export_model(model, sample, Path(temporary), preprocessing)
        mlflow.pyfunc.save_model(
            path=out_dir,
            python_model=str(script),
            artifacts={"network": str(archive)},
            signature=signature,
            input_example=inputs[:2],
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


def log_model(
    tracker: Tracker,
    model: nn.Module,
    sample: Tensor,
    predictions: Tensor,
    name: str,
    step: int,
    points: Mapping[str, Point],
    *,
    preprocessing: nn.Module | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Keep the trained model with the run: `mlflow.pyfunc.load_model("runs:/<run_id>/<name>")`.

    `step`, `points`: see `Tracker.log_model`. The export happens here and now and takes seconds; the
    tracker uploads in the background. `preprocessing`, `class_names`: see `save_model`.
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


def _on_cpu(model: nn.Module) -> nn.Module:
    """A copy for inference. Each tensor gets its own memory: the archive stores the whole
    storage behind a tensor, and a trainer may keep all parameters as views of one."""
    network = copy.deepcopy(model).eval()
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            cast = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None)
            tensor.data = cast.clone(memory_format=torch.contiguous_format)
    for parameter in network.parameters():
        parameter.grad = None
    return network


def _as_input(sample: Tensor) -> Tensor:
    return sample.detach().to("cpu", torch.float32 if sample.is_floating_point() else None)


def _require_no_pickle(path: Path, model: nn.Module) -> None:
    pickled = pickled_records(path)
    if pickled:
        path.unlink()
        raise TrainingError(
            f"{type(model).__name__} can't be exported without pickle: {', '.join(pickled[:5])} "
            "are tensor subclasses or script objects; use plain tensors"
        )
