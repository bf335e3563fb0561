"""How the slots' gradients become one gradient: several reducers behind one interface.

`Solo` where one rank needs no more than autograd's own accumulation, `Fast` on DDP's reducer,
`Compressed` where fewer bytes shall travel, `Exact` on one fixed pairwise tree over slot numbers.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from descent.data.batch import Batch
from descent.training.collectives import Group
from descent.training.reduction.compressed import Compressed
from descent.training.reduction.exact import Exact
from descent.training.reduction.losses import LossOf
from descent.training.reduction.plain import Fast, Solo, UnusedParameters
from descent.training.results import MicroBatchLoss
from descent.training.stopwatch import Stopwatch

__all__ = ["Reducer", "UnusedParameters", "reducer_for"]


class Reducer(Protocol):
    """Turns the gradients of a step's slots, on all ranks, into one gradient in the parameters' `.grad`.

    The calls of one step, on every rank in this order:

        begin_step()
        for each micro-batch of the rank, slot after slot:
            loss = forward(batch, samples, last=…)
            backward(loss.total, scale, last=…)
            end_slot(slot)                      # after the slot's last micro-batch
        finish_step()
        nonfinite_ranks()                       # only where the step is not committed

    `last` marks the rank's last micro-batch of the step, in its forward and in its backward. During that
    backward each bucket of gradients is sent off as soon as it is whole, in one order on all ranks.
    After a PeerLost the reducer is given up with its generation; the gradients are then worth nothing.
    """

    def begin_step(self) -> None:
        """Forget the gradients of the step before."""
        ...

    def forward(self, batch: Batch, samples: range, *, last: bool) -> MicroBatchLoss:
        """The loss of a micro-batch, whose samples have these places in the step's global batch.

        Raises PeerLost where the forward of a reducer talks to others.
        """
        ...

    def backward(self, loss: Tensor, scale: Tensor, *, last: bool) -> None:
        """Add d loss / d parameter, times `scale`, to the slot's gradient.

        loss: the loss sum of the micro-batch whose forward came just before, a 0-d tensor. scale: a 0-d
        tensor on the same device. Raises PeerLost when a collective can't be started or finished.
        """
        ...

    def end_slot(self, slot: int) -> None:
        """The gradient of `slot`, one of this rank's, is whole."""
        ...

    def finish_step(self) -> None:
        """Wait until `.grad` of every parameter holds the sum over the global batch, with the same bits on all ranks.

        `.grad` is None for a parameter that no micro-batch on any rank has used, as after torch's own
        backward over the whole batch. Raises PeerLost.
        """
        ...

    def nonfinite_ranks(self) -> tuple[int, ...]:
        """After `finish_step`, for a step that is not committed: the ranks that are known to have sent a number
        that isn't finite. Empty where that can't be known."""
        ...

    def assign_slots(self, shares: Sequence[tuple[int, int]]) -> None:
        """Between two steps: from now on rank r holds the slots shares[r][0] … shares[r][1]-1."""
        ...


@contextlib.contextmanager
def reducer_for(
    model: nn.Module,
    loss: LossOf,
    group: Group,
    *,
    kind: str,
    compress: str | None,
    shares: Sequence[tuple[int, int]],
    slots: int,
    find_unused: bool,
    stopwatch: Stopwatch,
) -> Iterator[Reducer]:
    """The reducer of one generation; its hooks on the parameters are gone when the generation ends.

    model: the module, compiled or not. loss: what its forward and its loss are called by. kind: "exact" or "fast". compress: None, "bf16" or "powersgd",
    with kind "fast". shares: per rank the half-open range of its slots, of `slots` in all.
    find_unused: whether this rank knows that some steps leave parameters unused. stopwatch: halted while a
    backward waits for other ranks. Raises PeerLost.
    """
    if group.world_size == 1 and (slots == 1 or kind == "fast"):
        yield Solo(model, loss)
    elif kind == "fast" and compress is None:
        yield Fast(model, loss, group, _any_rank(group, find_unused), stopwatch)
    else:
        made = (
            Exact(model, loss, group, shares, slots) if compress is None else Compressed(model, loss, group, compress)
        )
        with contextlib.closing(made):
            yield made


def _any_rank(group: Group, answer: bool) -> bool:
    """Whether any rank answers yes. Raises PeerLost."""
    return bool(group.sum_(torch.tensor([float(answer)], device=group.device)).item())
