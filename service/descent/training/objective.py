"""Losses as a sum and a count: these add up exactly over uneven shares of a batch, means don't."""

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from descent.data.base import Data, root_of
from descent.errors import ConfigError

_MODULE = "torch.nn.modules.loss"
_PER_SAMPLE = (
    nn.CTCLoss,
    nn.CosineEmbeddingLoss,
    nn.TripletMarginLoss,
    nn.MarginRankingLoss,
    nn.MultiMarginLoss,
    nn.MultiLabelMarginLoss,
    nn.MultiLabelSoftMarginLoss,
)
"""torch's losses whose mean is one over samples, not over elements."""
_ELEMENTWISE = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.KLDivLoss,
    nn.SoftMarginLoss,
    nn.HingeEmbeddingLoss,
    nn.MultiLabelSoftMarginLoss,
)
"""torch's losses that compare outputs and targets element by element."""
_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)


class LossSum(NamedTuple):
    """The loss of some samples. Over the parts of a batch both numbers add up."""

    total: Tensor
    """0-d, with its graph where one is recorded."""
    terms: Tensor | float
    """What the total is divided by for the mean: a number, or a 0-d tensor where the labels decide it."""


class Reading(StrEnum):
    """How a loss's number for a batch becomes a sum and a count."""

    TERMS = "terms"
    """One of torch's own: asked for its sum, and counted as torch's mean counts."""
    SAMPLES = "samples"
    """A mean over the samples of the batch."""
    TOTAL = "total"
    """A sum over the samples: the loss of a step is the sum over the global batch, divided by nothing."""
    PAIR = "pair"
    """The loss itself gives (total, count)."""
    LABELS = "labels"
    """A mean over the batch's labels that are not -100."""
    NEXT_LABELS = "next labels"
    """A mean over the labels but for the first of each sequence, as a model that predicts the next token has it."""


def with_tensors(spec: Mapping[str, Any], target: Callable[..., Any]) -> dict[str, Any]:
    """The spec of a loss with float32 tensors in the place of numbers and lists of numbers, where the class wants a tensor.

    Raises ConfigError for a list that is no tensor.
    """
    try:
        wanted = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return dict(spec)
    filled = dict(spec)
    for key, value in spec.items():
        numbers = isinstance(value, list | int | float) and not isinstance(value, bool)
        if key in wanted and numbers and "Tensor" in str(wanted[key].annotation):
            try:
                filled[key] = torch.tensor(value, dtype=torch.float32)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"loss.{key}={value}: must be a number, or a list of numbers: {error}") from error
    return filled


@dataclass(frozen=True)
class Objective:
    """A loss (output, target) -> number, as the sum and the count of a batch."""

    loss: Callable[[Tensor, Tensor], Any]
    """torch's own with reduction="sum"; any other as its author built it."""
    reading: Reading
    as_built: Callable[[Tensor, Tensor], Any]
    """The loss as its author built it, for comparison."""
    classes_last: bool | None = None
    """Whether the classes are the outputs' last dimension, targets [n, t] with outputs [n, t, classes]; torch's
    own place for classes is dimension 1. None: torch's place wherever the shapes allow that."""
    all_count: bool = False
    """Whether it is known that no label is ignored."""

    @classmethod
    def of(cls, loss: object, reading: Reading | None = None, classes_last: bool | None = None) -> "Objective":
        """The objective of a loss object.

        reading: None for what the class alone shows: torch's own losses are known, others are taken for a mean over
        samples (the preflight finds out whether they are). Raises ConfigError for what can't be a loss.
        """
        if not callable(loss):
            raise ConfigError(f"loss._target_: {type(loss).__name__} can't be called with (output, target)")
        reduction = getattr(loss, "reduction", "mean")
        if reduction not in ("mean", "sum", "batchmean"):
            raise ConfigError(f"loss.reduction={reduction}: Descent needs one number a batch; leave it out")
        own = _is_torchs(loss)
        if reading is None:
            reading = Reading.SAMPLES if not own else Reading.TOTAL if reduction == "sum" else Reading.TERMS
        as_built = loss
        if reading is Reading.TERMS:
            as_built, loss = loss, deepcopy(loss)
            loss.reduction = "sum"  # type: ignore[attr-defined]
        return cls(loss, reading, as_built, classes_last)

    def over(self, targets: Tensor) -> "Objective":
        """This objective for targets that are all among these: whether some are ignored is looked up once."""
        if not self.by_class or targets.is_floating_point():
            return self
        return replace(self, all_count=not bool((_comparable(targets) == self.ignored).any()))

    def within(self, data: Data) -> "Objective":
        """This objective for batches of `data`, whose labels are searched once for ignored ones if they are in memory."""
        labels = root_of(data).labels
        return self.over(labels) if labels is not None and data.in_memory else self

    def to(self, device: torch.device) -> "Objective":
        """This objective with the loss's own tensors (class weights) on the device."""
        if not isinstance(self.loss, nn.Module):
            return self
        as_built = self.as_built.to(device) if isinstance(self.as_built, nn.Module) else self.as_built
        return replace(self, loss=self.loss.to(device), as_built=as_built)

    @property
    def is_known(self) -> bool:
        """Whether the loss is one of torch's own whose sum and count are known without trying."""
        return self.reading is Reading.TERMS and type(self.loss) in (*_PER_SAMPLE, *_ELEMENTWISE, *_CLASSES)

    @property
    def by_class(self) -> bool:
        """Whether targets are class numbers or probabilities, so that an accuracy makes sense."""
        return isinstance(self.loss, _CLASSES)

    @property
    def by_element(self) -> bool:
        """Whether the loss is torch's own and compares outputs and targets element by element."""
        return self.reading is not Reading.SAMPLES and isinstance(self.loss, _ELEMENTWISE) and _is_torchs(self.loss)

    @property
    def is_regression(self) -> bool:
        """Whether the loss compares values with values, so that R² and the mean absolute error make sense."""
        return self.by_element and isinstance(self.loss, nn.MSELoss | nn.L1Loss | nn.SmoothL1Loss | nn.HuberLoss)

    @property
    def ignored(self) -> int:
        """The label that doesn't count."""
        return int(getattr(self.loss, "ignore_index", -100))

    def __call__(self, output: Tensor, target: Tensor) -> LossSum:
        """The sum and the count of a batch; outputs in half precision are taken to float32 first.

        Raises ConfigError where output and target would be broadcast against each other.
        """
        output, target = self.fitted(output, target)
        value = self.loss(output, target)
        match self.reading:
            case Reading.TERMS:
                return LossSum(value, self.num_terms(target))
            case Reading.SAMPLES:
                return LossSum(value * target.shape[0], target.shape[0])
            case Reading.TOTAL:
                return LossSum(value, 0)  # where nothing counts, a sum is divided by nothing
            case Reading.PAIR:
                return LossSum(*value)
            case _:
                raise AssertionError(f"{self.reading} is a reading of an own task's loss")

    def fitted(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Output and target in the shapes and precision in which the loss takes them."""
        if output.dtype in (torch.float16, torch.bfloat16):
            output = output.float()
        if self.by_class and self.class_dimension(output, target) != 1:
            return output.flatten(0, -2), target.flatten()
        if self.by_element and output.shape != target.shape:
            # [n, 1] against [n] would broadcast to [n, n] and train on nonsense
            if _without_ones(output) != _without_ones(target):
                raise ConfigError(
                    f"loss={type(self.loss).__name__}: compares outputs and targets one by one, but the outputs "
                    f"are {list(output.shape)} and the targets {list(target.shape)}; make their shapes equal"
                )
            output = output.view_as(target)
        return output, target

    def class_dimension(self, output: Tensor, target: Tensor) -> int:
        """Which dimension of the outputs [n, …] holds the classes: 1, as torch has it, or the last."""
        if output.dim() <= 2 or target.is_floating_point() or target.shape != output.shape[:-1]:
            return 1
        fits_torch = target.shape == (output.shape[0], *output.shape[2:])
        return output.dim() - 1 if self.classes_last or (self.classes_last is None and not fits_torch) else 1

    def num_terms(self, target: Tensor) -> Tensor | float:
        """What torch's mean over `target` divides by.

        Labels that are ignored don't count, and each of the others as much as its class weight.
        """
        if isinstance(self.loss, _PER_SAMPLE) or getattr(self.as_built, "reduction", "mean") == "batchmean":
            return target.shape[0]
        if not isinstance(self.loss, _CLASSES):
            return target.numel()
        if target.is_floating_point():  # probabilities: [n, classes, …]
            return target.numel() // max(1, target.shape[1])
        if self.loss.weight is None:
            return self.num_labels(target)
        weights = self.loss.weight.double()
        return (weights[target.long().clamp(0, len(weights) - 1)] * (_comparable(target) != self.ignored)).sum()

    def num_labels(self, target: Tensor) -> Tensor | int:
        """How many labels are not ignored, whatever their classes weigh; a 0-d tensor on a GPU."""
        if target.is_floating_point():
            return target.numel() // max(1, target.shape[1])
        if self.all_count:
            return target.numel()
        target = _comparable(target)
        if target.device.type == "cpu":
            # The same number by a tenth of the time that two of torch's kernels take to start.
            return int(np.count_nonzero(target.numpy() != self.ignored))
        return (target != self.ignored).sum()

    def num_correct(self, output: Tensor, target: Tensor) -> Tensor:
        """How many predictions are right, without ignored labels: a 0-d int64 tensor.

        A prediction is the class with the largest output. Where targets are probabilities, the most probable
        class is the right one.
        """
        predicted = output.argmax(self.class_dimension(output, target))
        if target.is_floating_point():
            return (predicted == target.argmax(1)).sum()
        target = _comparable(target)
        return ((predicted == target) & (target != self.ignored)).sum()


def _is_torchs(loss: object) -> bool:
    """Whether the class, or the class from which it has its forward, is one of torch's own losses."""
    home = next((c for c in type(loss).__mro__ if "forward" in vars(c)), object)
    return home.__module__ == _MODULE and isinstance(loss, nn.Module)


def _comparable(target: Tensor) -> Tensor:
    """Labels in bytes as wider numbers: an ignored -100 would wrap around to 156."""
    return target.short() if target.dtype is torch.uint8 else target


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]
