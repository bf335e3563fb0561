"""What a finished run keeps of how its classifier does on the evaluation set: tables and pictures, in MLflow and its folder."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from descent.config import RunConfig

if TYPE_CHECKING:
    from descent.training.class_report import ClassReport, WrongSample
    from descent.training.plan import Prepared

FOLDER = "classes"
"""Of the run, and among its artifacts."""
_PATIENCE_S = 20.0
"""A set that takes longer to look at is looked at in part."""


def write_class_report(config: RunConfig, prepared: "Prepared", run_dir: Path, step: int) -> list[Path]:
    """Look at the evaluation set with the weights that the prepared model has; the files that were written.

    None where there is no evaluation set, or where the run's task is no classification. step: of the weights.
    Raises DescentError, OSError.
    """
    from descent.training.class_report import class_report, within
    from descent.training.input.feed import Feed
    from descent.training.task import Supervised

    data, task = prepared.evaluate, prepared.task
    if data is None or not isinstance(task, Supervised) or not task.objective.by_class:
        return []
    feed = Feed(data, None, torch.device("cpu"), seed=config.seed, on_error=config.data.on_error)
    size = config.evaluate.batch_size
    report = class_report(prepared.model, task, feed, len(data), size=size, enough=within(_PATIENCE_S))
    if report is None:
        return []
    count = len(report.confusion)
    names = list(prepared.train.class_names or ())
    names += [str(number) for number in range(len(names), count)]
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return [*_tables(report, names, folder), *_pictures(report, names, prepared, folder, step)]


def _tables(report: "ClassReport", names: Sequence[str], folder: Path) -> list[Path]:
    labels = report.confusion.sum(1)
    classes = (
        (name, labels[i], *(f"{values[i]:.6g}" for values in (report.loss, report.recall, report.precision)))
        for i, name in enumerate(names[: len(labels)])
    )
    worst = ((s.number, names[s.label], names[s.predicted], f"{s.loss:.6g}") for s in report.worst)
    matrix = ((name, *row) for name, row in zip(names, report.confusion, strict=False))
    return [
        _csv(folder / "confusion.csv", ["class", *names[: len(labels)]], matrix),
        _csv(folder / "classes.csv", ["class", "labels", "loss", "recall", "precision"], classes),
        _csv(folder / "worst_samples.csv", ["sample", "class", "taken for", "loss"], worst),
    ]


def _csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        table.writerows(rows)
    return path


def _pictures(
    report: "ClassReport", names: Sequence[str], prepared: "Prepared", folder: Path, step: int
) -> Iterable[Path]:
    from descent.tracking.class_plots import class_loss_plot, confusion_plot, sample_plot

    part = "" if report.num_seen == report.num_samples else f", {report.num_seen:,} of {report.num_samples:,} samples"
    at = f"at step {step:,}{part}"
    images = [image for s in report.worst if (image := _image(s, prepared)) is not None]
    lines = [f"{s.number}: {names[s.label][:12]}\nas {names[s.predicted][:12]}" for s in report.worst]
    drawn = {
        "confusion.png": lambda path: confusion_plot(report.confusion, names, f"Confusion {at}", path),
        "class_loss.png": lambda path: class_loss_plot(report.loss, names, f"Loss on each class {at}", path),
        "worst_samples.png": lambda path: sample_plot(images, lines[: len(images)], f"Largest losses {at}", path),
    }
    return [folder / name for name, draw in drawn.items() if draw(folder / name)]


def _image(sample: "WrongSample", prepared: "Prepared") -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None":
    """A sample's inputs as a picture, [h, w] or [h, w, 3]; None where they are none."""
    inputs = sample.inputs
    if inputs.dim() != 3 or inputs.shape[0] not in (1, 3) or not inputs.is_floating_point():
        return None
    if prepared.train.preprocessing is not None:
        inputs = prepared.train.preprocessing.undo(inputs[None])[0]
    image: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = inputs.double().nan_to_num().movedim(0, -1).numpy()
    return image[..., 0] if image.shape[-1] == 1 else image
