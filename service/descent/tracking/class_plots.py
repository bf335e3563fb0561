"""The pictures of a classifier on its evaluation set: its confusion matrix, its loss on each class, its worst samples.

Drawn without pyplot, as those in `plots.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from descent.tracking.plots import BLUE, empty_figure, write_png

_MAX_SHOWN, _MAX_NAMED, _MAX_NUMBERED = 200, 40, 20
"""Classes: of more there is no picture; names at the axes; numbers in the cells."""


def confusion_plot(confusion: NDArray[np.int64], names: Sequence[str], title: str, path: Path) -> bool:
    """Draw [classes, classes] (rows: the labels, columns: what they were taken for); False for too many classes."""
    count = len(confusion)
    if count > _MAX_SHOWN:
        return False
    figure = empty_figure(9.5, 8.5)
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_title(title, loc="left", fontsize=15, fontweight="bold", pad=12)
    axes.set_xlabel("taken for", fontsize=13)
    axes.set_ylabel("class", fontsize=13)
    if count <= _MAX_NAMED:
        shown = [name if len(name) <= 18 else name[:17] + "…" for name in names]
        axes.set_xticks(range(count), shown, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), shown)
    if count <= _MAX_NUMBERED:
        for row, column in zip(*np.nonzero(confusion), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{confusion[row, column]:,}", ha="center", va="center", color=color, fontsize=10)
    figure.colorbar(picture, ax=axes, shrink=0.8).set_label("share of the class", fontsize=12)
    write_png(figure, path)
    return True


def class_loss_plot(loss: NDArray[np.float64], names: Sequence[str], title: str, path: Path) -> bool:
    """Draw the mean loss on each class, [classes], the largest first, at most 40 of them; False where there is none."""
    order = [i for i in np.argsort(-np.nan_to_num(loss, nan=-np.inf)) if np.isfinite(loss[i])][:_MAX_NAMED]
    if not order:
        return False
    figure = empty_figure(9.5, 2.0 + 0.28 * len(order))
    axes = figure.add_subplot()
    axes.barh([names[i] if len(names[i]) <= 28 else names[i][:27] + "…" for i in order], loss[order], color=BLUE)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=15, fontweight="bold", pad=12)
    axes.set_xlabel("mean loss", fontsize=13)
    axes.spines[["top", "right"]].set_visible(False)
    write_png(figure, path)
    return True


def sample_plot(images: Sequence[NDArray[Any]], lines: Sequence[str], title: str, path: Path) -> bool:
    """Draw images ([h, w], or [h, w, 3], of any range) in a grid, each with its line; False where there is none."""
    if not images:
        return False
    columns = min(5, len(images))
    rows = -(-len(images) // columns)
    figure = empty_figure(2.2 * columns, 2.5 * rows + 0.6)
    figure.suptitle(title, fontsize=15, fontweight="bold")
    for index, (image, line) in enumerate(zip(images, lines, strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        low, high = float(np.nanmin(image)), float(np.nanmax(image))
        axes.imshow((image - low) / (high - low or 1.0), cmap="gray")
        axes.set_title(line, fontsize=9)
        axes.set_axis_off()
    write_png(figure, path)
    return True
