"""The loss of a micro-batch as the reducers call it, and as the module that torch's DDP wants."""

from collections.abc import Callable

from torch import nn

from descent.data.batch import Batch
from descent.training.results import MicroBatchLoss

LossOf = Callable[[Batch, range], MicroBatchLoss]
"""(batch, places of its samples in the step's global batch) -> the loss, with the graph of its forward."""


class LossModule(nn.Module):
    """The model and its loss as one module: a batch goes in, the loss comes out."""

    def __init__(self, model: nn.Module, loss: LossOf) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Batch, samples: range) -> MicroBatchLoss:
        return self._loss(batch, samples)
