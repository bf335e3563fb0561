"""What a task returns of some samples: numbers that add up over the parts of a batch, whoever computes which part.

`Mean` and `Sum` are added up in the order of slots (training) or of chunks (evaluation), and `Rows` are put
one behind the other in the order of the samples, so the results have the same bits for any number of workers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A mean, as the two numbers whose sums over all parts give it: total / count.

    total: a 0-d tensor (with its graph where it is a loss), or a number.
    count: what the mean divides by, such as the number of samples or of labels that count.
    """

    total: Tensor | float
    count: Tensor | float


@dataclass(frozen=True)
class Sum:
    """A tensor of any shape (or a number) that adds up over samples, such as a confusion matrix.

    The shape is the same for every part.
    """

    value: Tensor | float


@dataclass(frozen=True)
class Rows:
    """One row a sample, to be gathered from all parts in the order of the samples: a tensor [n, …].

    The trailing dimensions are the same for every part.
    """

    value: Tensor


@dataclass(frozen=True)
class Predictions:
    """What the configured metrics (`metrics.NAME`) compare: the arguments of torchmetrics' `update(preds, target)`.

    preds and target: tensors, or whatever the metric takes, such as lists of texts.
    """

    preds: Any
    target: Any


Result = Mean | Sum | Rows | Predictions


class MicroBatchLoss(NamedTuple):
    """The loss of a micro-batch, as the step takes it."""

    total: Tensor
    """The loss sum, a 0-d tensor with its graph."""
    terms: Tensor | float
    """What the total is divided by for the mean: a number, or a 0-d tensor where the labels decide it."""
    logged: Mapping[str, Mean] = MappingProxyType({})
    """Further means of the same samples, which are logged beside the loss."""
    reported: Tensor | float | None = None
    """The part of the step's loss that this micro-batch reports, where that is not `total`."""
