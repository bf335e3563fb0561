"""Losses as sums: a sum and a count add up exactly over uneven shares, means don't."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from descent.errors import ConfigError

_PER_SAMPLE = (
    nn.KLDivLoss,
    nn.CTCLoss,
    nn.CosineEmbeddingLoss,
    nn.TripletMarginLoss,
    nn.MarginRankingLoss,
    nn.MultiMarginLoss,
    nn.MultiLabelMarginLoss,
    nn.MultiLabelSoftMarginLoss,
)
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
_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)


@dataclass(frozen=True)
class Objective:
    """A loss as (sum, count) of a batch.

    torch's own losses are asked for their sum. Any other callable (output, target) ->
    scalar is taken to be a mean over samples.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    sums: bool
    all_count: bool = False
    """Whether it is known that no label is ignored."""

    @classmethod
    def of(cls, loss: object) -> "Objective":
        if not callable(loss):
            raise ConfigError(f"loss._target_: {type(loss).__name__} can't be called with (output, target)")
        if hasattr(loss, "reduction"):
            if loss.reduction not in ("mean", "sum", "batchmean"):
                raise ConfigError(f"loss.reduction={loss.reduction}: Descent needs one number a batch; leave it out")
            loss.reduction = "sum"
            return cls(loss, True)
        return cls(loss, False)

    def over(self, targets: Tensor) -> "Objective":
        """This loss for targets that are all among these: whether some are ignored is looked at once."""
        if not isinstance(self.loss, _CLASSES) or targets.is_floating_point():
            return self
        if targets.dtype is torch.uint8:
            targets = targets.short()  # an ignored -100 would wrap around
        return replace(self, all_count=not bool((targets == self.loss.ignore_index).any()))

    @property
    def by_class(self) -> bool:
        """Whether targets are class numbers, so that an accuracy makes sense."""
        return isinstance(self.loss, _CLASSES)

    def count(self, target: Tensor) -> Tensor | int:
        """What torch's mean over `target` would divide by: a number, or 0-d where labels decide it.

        Labels that are ignored don't count, and each of the others as much as its class weight.
        """
        if not self.sums or isinstance(self.loss, _PER_SAMPLE):
            return target.shape[0]
        if not isinstance(self.loss, _CLASSES):
            return target.numel()
        if target.is_floating_point():  # probabilities: [n, classes, …]
            return target.numel() // max(1, target.shape[1])
        ignored = self.loss.ignore_index
        if self.loss.weight is None and self.all_count:
            return target.numel()
        if self.loss.weight is None and target.device.type == "cpu":
            # The same number by a tenth of the time that two of torch's kernels take to start.
            return int(np.count_nonzero(target.numpy() != ignored))
        kept = target != ignored
        if self.loss.weight is None:
            return kept.sum()
        weights = self.loss.weight.double()
        return (weights[target.clamp(0, len(weights) - 1)] * kept).sum()

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss summed over the batch (a 0-d tensor).

        Raises ConfigError where output and target would be broadcast against each other.
        """
        output = output.float() if output.is_floating_point() else output
        if not self.sums:
            return self.loss(output, target) * target.shape[0]
        if self.by_class and output.dim() == 3 and target.shape == output.shape[:2]:
            output, target = output.flatten(0, 1), target.flatten()
        elif isinstance(self.loss, _ELEMENTWISE) and output.shape != target.shape:
            # [n, 1] against [n] would broadcast to [n, n] and train on nonsense
            if _without_ones(output) != _without_ones(target):
                raise ConfigError(
                    f"loss={type(self.loss).__name__}: compares outputs and targets one by one, but the outputs "
                    f"are {list(output.shape)} and the targets {list(target.shape)}; make their shapes equal"
                )
            output = output.view_as(target)
        return self.loss(output, target)

    def num_correct(self, output: Tensor, target: Tensor) -> Tensor:
        """Class predictions that are right, without ignored labels (a 0-d int64 tensor)."""
        classes = -1 if output.shape[:-1] == target.shape else 1  # torch's own place for them is 1
        right = output.argmax(classes) == target
        return (right & (target != getattr(self.loss, "ignore_index", -100))).sum()


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]
