"""Losses that compare the samples of a batch with each other: contrastive ones, Dice over a batch, batch-hard triplets.

Such a loss can't be computed part by part. What it needs of each sample can: its features. So a step has two
passes. In the first, each rank computes the features of its micro-batches, without a graph; the features of the
whole global batch are gathered in the order of the samples; and every rank computes the loss and its gradient by
these features: the same numbers on every rank. In the second pass each micro-batch is computed again, with the same
random numbers, and the gradient by its features is led back through the model (Gao et al. 2021, 'Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup'). Loss and gradient are those of the whole batch, with
the same bits for any number of workers, for one further forward.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from descent.data.batch import Batch, describe, map_tensors, tensors_of
from descent.errors import TrainingError
from descent.training.collectives import Group
from descent.training.results import Mean, MicroBatchLoss
from descent.training.task import OwnTask

if TYPE_CHECKING:
    from descent.training.step import BatchSource, MicroBatch

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.int32: torch.int32, torch.int64: torch.int64}


class Coupling:
    """A step's first pass, and the loss of its second pass; between the two it keeps the rank's batches."""

    def __init__(self, task: OwnTask, model: nn.Module, feed: "BatchSource", batch_size: int) -> None:
        self._task, self._model, self._feed, self._batch_size = task, model, feed, batch_size
        self._kept: dict[tuple[int, int], Batch] = {}
        self._upstream: list[Tensor | None] = []
        """The gradient of the loss by the features of the whole batch, [batch size, …] each; None: not needed."""
        self._whole: MicroBatchLoss | None = None

    def fetch(self, step: int, first: int, stop: int) -> Batch:
        """Samples first … stop-1 of the step's global batch; in the second pass those that the first has fetched."""
        kept = self._kept.pop((first, stop), None)
        return self._feed.fetch(step, first, stop) if kept is None else kept

    def first_pass(
        self, step: int, micro_batches: "Sequence[MicroBatch]", begin: "Callable[[MicroBatch], None]", group: Group
    ) -> None:
        """Compute the loss of the whole batch and its gradient by the features. Raises PeerLost, TrainingError.

        begin: seeds the generators and puts the buffers back, where a micro-batch begins a slot.
        """
        self._kept.clear()
        parts: list[tuple[MicroBatch, list[Tensor]]] = []
        tree: Batch = None
        for micro in micro_batches:
            begin(micro)
            batch = self._kept[micro.first, micro.stop] = self._feed.fetch(step, micro.first, micro.stop)
            with torch.no_grad():
                tree = features_of(self._task, self._model, batch, micro.stop - micro.first)
            parts.append((micro, [tensor for _, tensor in tensors_of(tree)]))
        leaves = [self._gathered(index, parts, group) for index in range(len(parts[0][1]))]
        leaves = [leaf.requires_grad_() if leaf.is_floating_point() else leaf for leaf in leaves]
        given = iter(leaves)
        loss = self._task.coupled(map_tensors(lambda _: next(given), tree), self._batch_size)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(loss.total, wanted, allow_unused=True))
        self._upstream = [next(found) if leaf.requires_grad else None for leaf in leaves]
        self._whole = loss._replace(total=loss.total.detach())

    def _gathered(self, index: int, parts: "list[tuple[MicroBatch, list[Tensor]]]", group: Group) -> Tensor:
        """The features of the whole batch, [batch size, …], in the order of the samples."""
        like = parts[0][1][index]
        whole = like.new_zeros(self._batch_size, *like.shape[1:])
        for micro, leaves in parts:
            whole[micro.first : micro.stop] = leaves[index]
        # One rank has each row, so a sum gathers them; of bits, because -0.0 + 0.0 is 0.0.
        return group.sum_(whole.view(_BITS[whole.dtype])).view(whole.dtype) if group.world_size > 1 else whole

    def loss(self, batch: Batch, samples: range) -> MicroBatchLoss:
        """A number whose gradient by the parameters is that of the whole batch's loss through these samples.

        The rank with the first sample reports the loss of the whole batch.
        """
        assert self._whole is not None
        features = features_of(self._task, self._model, batch, len(samples))
        total: Tensor | None = None
        for (_, leaf), upstream in zip(tensors_of(features), self._upstream, strict=True):
            if upstream is not None:
                part = (leaf * upstream[samples.start : samples.stop]).sum()
                total = part if total is None else total + part
        if total is None or not total.requires_grad:
            raise TrainingError(f"{self._task.where}: the loss that couple gives depends on no feature of the model")
        if samples.start == 0:
            return self._whole._replace(total=total, reported=self._whole.total)
        return MicroBatchLoss(total, 0, {name: Mean(0.0, 0) for name in self._whole.logged}, 0.0)


def features_of(task: OwnTask, model: nn.Module, batch: Batch, num_samples: int) -> Batch:
    """What the task's `features` gives: a tree of tensors, each [num_samples, …], in full precision.

    Raises TrainingError for anything else.
    """
    with task.autocast():
        found = task.functions["features"](model, batch)
    leaves = [tensor for _, tensor in tensors_of(found)]
    if not leaves or any(not t.dim() or len(t) != num_samples for t in leaves):
        raise TrainingError(
            f"{task.where}: features gives {describe(found)} for {num_samples} samples; it must give tensors with one row "
            "a sample (two views of a sample are two entries of a row: [n, 2, width], or two tensors)"
        )

    def wide(tensor: Tensor) -> Tensor:
        if tensor.dtype in (torch.float16, torch.bfloat16):
            return tensor.float()
        return tensor if tensor.dtype in _BITS else tensor.long()

    return map_tensors(wide, found)
