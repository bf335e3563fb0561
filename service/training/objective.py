"""Losses as sums: a sum and a count add up exactly over uneven shares, means don't."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from service.errors import ConfigError

_PER_SAMPLE = (nn.KLDivLoss, nn.CTCLoss, nn.CosineEmbeddingLoss, nn.TripletMarginLoss,
               nn.MarginRankingLoss, nn.MultiMarginLoss, nn.MultiLabelMarginLoss)  # fmt: skip
_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)


@dataclass(frozen=True)
class Objective:
    """A loss as (sum, count) of a batch.

    torch's own losses are asked for their sum. Any other callable (output, target) ->
    scalar is taken to be a mean over samples.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    sums: bool

    @classmethod
    def of(cls, loss: object) -> "Objective":
        if not callable(loss):
            raise ConfigError(
                f"loss._target_: {type(loss).__name__} can't be called with (output, target)"
            )
        if hasattr(loss, "reduction"):
            if loss.reduction not in ("mean", "sum", "batchmean"):
                raise ConfigError(
                    f"loss.reduction={loss.reduction}: Descent needs one number a batch; leave it out"
                )
            loss.reduction = "sum"
            return cls(loss, True)
        return cls(loss, False)

    @property
    def by_class(self) -> bool:
        """Whether targets are class numbers, so that an accuracy makes sense."""
        return isinstance(self.loss, _CLASSES)

    def count(self, target: Tensor) -> int:
        """How many terms the sum over `target` has: what a mean would divide by."""
        if not self.sums or isinstance(self.loss, _PER_SAMPLE):
            return target.shape[0]
        if self.by_class and target.is_floating_point():
            return target.shape[0]
        if self.by_class and target.dim() > 1:
            return int((target != self.loss.ignore_index).sum())  # type: ignore[attr-defined]
        return target.numel()

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss summed over the batch (a 0-d tensor)."""
        output = output.float() if output.is_floating_point() else output
        if not self.sums:
            return self.loss(output, target) * target.shape[0]
        if self.by_class and output.dim() == 3 and target.shape == output.shape[:2]:
            output, target = output.flatten(0, 1), target.flatten()
        elif (
            not self.by_class and output.shape != target.shape and output.numel() == target.numel()
        ):
            # [n, 1] against [n] would broadcast to [n, n] and train on nonsense
            output = output.view_as(target)
        return self.loss(output, target)

    def num_correct(self, output: Tensor, target: Tensor) -> Tensor:
        """Class predictions that are right (a 0-d int64 tensor)."""
        return (output.argmax(-1) == target).sum()


def takes_target(loss: object) -> bool:
    """Whether `loss` can be called with two arguments at all."""
    try:
        inspect.signature(loss).bind(None, None)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True


def all_finite(values: Tensor) -> bool:
    """Whether every entry is finite."""
    return bool(torch.isfinite(values).all())
