"""What a finished run gives away: its trained model, in MLflow and in the run's folder, in the forms that others take."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from descent.cluster.record import run_log
from descent.errors import TrainingError
from descent.storage import Location
from descent.tracking import Point, Tracker

if TYPE_CHECKING:
    from torch import Tensor, nn

    from descent.training.plan import Prepared

WEIGHTS = "model.safetensors"
"""In the artifact folder `model`, beside the run's file, where the model can't be exported."""
HUGGING_FACE = "huggingface"
"""The folder, of the run and among its artifacts, that `from_pretrained` takes."""


class ModelKeeper:
    """Keeps the trained model of a run: exported, where torch can; as its weights otherwise; and as a folder of its own
    library where the model is one of Hugging Face's."""

    def __init__(self, prepared: "Prepared", tracker: Tracker, run_dir: Path) -> None:
        self._prepared, self._tracker, self._run_dir = prepared, tracker, run_dir

    def keep(self, target: Location, name: str, step: int, points: Mapping[str, Point]) -> str | None:
        """Keep the model with the weights of the checkpoint `target`; the prepared model gets these weights.

        name: of the model in MLflow. Returns why the model could not be exported and its weights were kept instead; None
        where it was. Raises DescentError, OSError.
        """
        from descent.checkpoint.weights import put_checkpoint_into

        prepared = self._prepared
        weights = put_checkpoint_into(prepared.model, target)
        model = for_use(prepared.model)
        for line in self._hugging_face(model):
            self._tracker.set_tags({"descent.huggingface_error": line})
        try:
            self._export(model, name, step, points)
        except Exception as error:  # a user's forward may raise anything when it is traced
            line = " ".join(str(error).split())
            self._weights(weights, step)
            return line if isinstance(error, TrainingError) else f"{type(error).__name__}: {line}"
        return None

    def _export(self, model: "nn.Module", name: str, step: int, points: Mapping[str, Point]) -> None:
        from descent.tracking.export import Sample, predictions_of
        from descent.tracking.pyfunc import log_model
        from descent.training.export_arguments import export_arguments

        args, kwargs = export_arguments(self._prepared.task, model, self._prepared.sample)
        sample = Sample.of(model, args, kwargs)
        predictions = predictions_of(model, sample)
        # The model takes along what its data went through, and the names of its classes.
        train = self._prepared.train
        preprocessing = train.preprocessing if sample.is_one_tensor else None
        if preprocessing is not None:
            sample = Sample.of(model, (preprocessing.undo(args[0]),), {})
        log_model(
            self._tracker,
            model,
            sample,
            predictions,
            name,
            step,
            points,
            preprocessing=preprocessing,
            class_names=train.class_names,
        )

    def _weights(self, weights: "Mapping[str, Tensor]", step: int) -> None:
        """The weights and the run's file as artifacts: `descent.load` takes their folder."""
        from descent.checkpoint.weights import write_weights

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / WEIGHTS
            write_weights(weights, path, {"format": "pt", "run": self._run_dir.name, "step": str(step)})
            self._tracker.log_file(path, "model")
        self._tracker.log_file(self._run_dir / run_log.RUN_FILE, "model")

    def _hugging_face(self, model: "nn.Module") -> Iterator[str]:
        """Write the folder that `from_pretrained` takes; yields why that could not be done."""
        if not is_hugging_face(model):
            return
        folder = self._run_dir / HUGGING_FACE
        try:
            shutil.rmtree(folder, ignore_errors=True)
            model.save_pretrained(str(folder))  # type: ignore[operator]
            for one in self._tokenizers():
                one.save_pretrained(str(folder))
        except Exception as error:  # the library's own, and a full disk
            yield f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._tracker.log_file(path, str(Path(HUGGING_FACE) / path.relative_to(folder).parent))

    def _tokenizers(self) -> Iterator[Any]:
        """The tokenizer, or whatever prepares the model's inputs, that the task or a data set carries as an attribute."""
        from descent.data.base import root_of

        root = root_of(self._prepared.train)
        owners = [getattr(self._prepared.task, "task", None), root, getattr(root, "dataset", None)]
        owners += [getattr(root, "own_collate", None)]
        seen: set[int] = set()
        for owner in owners:
            for key in ("tokenizer", "processing_class", "processor", "image_processor", "feature_extractor"):
                found = getattr(owner, key, None)
                if callable(getattr(found, "save_pretrained", None)) and id(found) not in seen:
                    seen.add(id(found))
                    yield found


def is_hugging_face(model: "nn.Module") -> bool:
    """Whether the model can write itself as a folder that its own library reads."""
    return callable(getattr(model, "save_pretrained", None)) and hasattr(model, "config")


def for_use(model: "nn.Module") -> "nn.Module":
    """The model in evaluation mode; of a model with adapters (LoRA of peft) a copy with these merged into its weights."""
    import copy

    if callable(getattr(model, "merge_and_unload", None)):
        merged: nn.Module = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
        return merged.eval()
    return model.eval()
