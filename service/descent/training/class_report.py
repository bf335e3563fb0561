"""How a classifier does on its evaluation set, label by label: which classes it takes for which, its loss on each, and the
samples that it gets most wrong."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from descent.training.input.feed import Feed
from descent.training.task import Supervised

MAX_CLASSES = 1000
"""Of more classes no table is made."""
_WORST = 25


@dataclass(frozen=True)
class WrongSample:
    """A sample with a large loss."""

    number: int
    """In the data set as it is stored, before any split."""
    loss: float
    """The mean over its labels that count."""
    label: int
    """Its class; of a sample with several labels, the one with the largest loss."""
    predicted: int
    """The class that the model takes it for."""
    inputs: Tensor
    """As the model takes it: [*input_shape]."""


@dataclass(frozen=True)
class ClassReport:
    """What was found on the samples of an evaluation set that were looked at."""

    confusion: NDArray[np.int64]
    """[classes, classes]: how many labels of the class (row) were taken for the other (column)."""
    loss: NDArray[np.float64]
    """[classes]: the mean loss over the labels of each class; NaN where there are none."""
    worst: tuple[WrongSample, ...]
    """The samples with the largest loss, the largest first."""
    num_seen: int
    num_samples: int

    @property
    def recall(self) -> NDArray[np.float64]:
        """[classes]: the share of each class's labels that were recognized; NaN where there are none."""
        return _shares(self.confusion, self.confusion.sum(1))

    @property
    def precision(self) -> NDArray[np.float64]:
        """[classes]: the share of the predictions of each class that were right; NaN where there are none."""
        return _shares(self.confusion, self.confusion.sum(0))


def _shares(confusion: NDArray[np.int64], of: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(of > 0, confusion.diagonal() / np.maximum(of, 1), np.nan)


def class_report(
    model: nn.Module,
    task: Supervised,
    feed: Feed,
    num_samples: int,
    *,
    size: int,
    enough: Callable[[], bool],
) -> ClassReport | None:
    """The report of the model on the evaluation set; None where there are no class numbers, too many
    classes, or no loss for each label.

    feed: reads the evaluation set. size: samples in a forward. enough: whether to leave it at what was seen so far; the
    chunks are taken in an order that spreads them over the set. The model is left in evaluation mode.
    """
    each = deepcopy(task.objective.loss)
    assert isinstance(each, nn.Module)
    each.reduction = "none"  # type: ignore[assignment]
    starts = list(range(0, num_samples, size))
    order = np.argsort([_reversed_bits(i) for i in range(len(starts))], kind="stable")
    confusion = losses = None
    worst: list[WrongSample] = []
    seen = 0
    model.eval()
    with torch.no_grad():
        for chunk in order:
            indices = np.arange(starts[chunk], min(starts[chunk] + size, num_samples), dtype=np.int64)
            inputs, targets = feed.take(indices)
            if targets.is_floating_point():
                return None
            found = _labels(model, task, each, inputs, targets)
            if found is None or found.num_classes > MAX_CLASSES:
                return None
            if confusion is None or losses is None:
                confusion = np.zeros((found.num_classes, found.num_classes), dtype=np.int64)
                losses = np.zeros(found.num_classes)
            places = found.labels * found.num_classes + found.predicted
            counted = found.counts
            confusion += np.bincount(places[counted], minlength=confusion.size).reshape(confusion.shape)
            losses += np.bincount(found.labels[counted], found.losses[counted], minlength=found.num_classes)
            worst = sorted([*worst, *found.worst(feed.numbers(indices), inputs)], key=lambda s: -s.loss)[:_WORST]
            seen += len(indices)
            if enough():
                break
    if confusion is None or losses is None:
        return None
    labels = confusion.sum(1)
    mean = np.where(labels > 0, losses / np.maximum(labels, 1), np.nan)
    return ClassReport(confusion, mean, tuple(worst), seen, num_samples)


def within(seconds: float) -> Callable[[], bool]:
    """A function that says whether so many seconds have passed since this call."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() > deadline


@dataclass(frozen=True)
class _Labels:
    """The labels of some samples: [samples, labels of a sample] each."""

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    losses: NDArray[np.float64]
    counts: NDArray[np.bool_]
    num_classes: int

    def worst(self, numbers: NDArray[np.int64], inputs: Tensor) -> list[WrongSample]:
        """The samples with the largest loss."""
        counted = np.where(self.counts, self.losses, 0.0)
        each = counted.sum(1) / np.maximum(self.counts.sum(1), 1)
        order = np.argsort(-np.nan_to_num(each, nan=np.inf), kind="stable")[:_WORST]
        at = np.argmax(np.where(self.counts, np.nan_to_num(self.losses, nan=np.inf), -np.inf), 1)
        return [
            WrongSample(
                int(numbers[i]),
                float(np.nan_to_num(each[i], nan=np.inf)),
                int(self.labels[i, at[i]]),
                int(self.predicted[i, at[i]]),
                inputs[i].clone(),
            )
            for i in order
            if self.counts[i].any()
        ]


def _labels(model: nn.Module, task: Supervised, each: nn.Module, inputs: Tensor, targets: Tensor) -> _Labels | None:
    """What is known of each label; None where the loss gives no number for each."""
    n, objective = len(targets), task.objective
    with task.autocast():
        output, fitted = objective.fitted(model(inputs), targets)
        losses = each(output, fitted)
    classes = objective.class_dimension(output, fitted)
    if losses.numel() != fitted.numel():  # an own subclass that always gives a mean
        return None
    labels = fitted.long().reshape(n, -1)
    return _Labels(
        labels=labels.numpy(),
        predicted=output.argmax(classes).reshape(n, -1).numpy(),
        losses=losses.double().reshape(n, -1).numpy(),
        counts=(labels != objective.ignored).numpy(),
        num_classes=output.shape[classes],
    )


def _reversed_bits(number: int) -> int:
    """
    >>> sorted(range(8), key=_reversed_bits)
    [0, 4, 2, 6, 1, 5, 3, 7]
    """
    return int(f"{number:032b}"[::-1], 2)
