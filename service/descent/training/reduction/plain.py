"""The two reducers that are torch's own: autograd's accumulation, and DDP."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from descent.data.batch import Batch
from descent.training.collectives import Group, PeerLost, in_short, is_lost_peer
from descent.training.reduction.losses import LossModule, LossOf
from descent.training.results import MicroBatchLoss
from descent.training.stopwatch import Stopwatch


class UnusedParameters(PeerLost):
    """DDP waits for gradients that this step doesn't compute: the generation can't finish the step's reduction."""


class Solo:
    """One rank: autograd's own accumulation is the whole reduction. See `Reducer` for the methods."""

    def __init__(self, model: nn.Module, loss: LossOf) -> None:
        self._loss = loss
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def begin_step(self) -> None:
        for p in self._parameters:
            p.grad = None

    def forward(self, batch: Batch, samples: range, *, last: bool) -> MicroBatchLoss:  # noqa: ARG002
        return self._loss(batch, samples)

    def backward(self, loss: Tensor, scale: Tensor, *, last: bool) -> None:  # noqa: ARG002
        loss.backward(scale.to(loss.dtype))

    def end_slot(self, slot: int) -> None:
        pass

    def finish_step(self) -> None:
        pass

    def nonfinite_ranks(self) -> tuple[int, ...]:
        return (0,)

    def assign_slots(self, shares: Sequence[tuple[int, int]]) -> None:
        pass


class Fast(Solo):
    """torch's DistributedDataParallel: its buckets travel while the backward still runs.

    Where `find_unused` is False, DDP waits for a gradient of every parameter. A step that leaves one
    without raises UnusedParameters; the next generation is then built with `find_unused`.
    """

    def __init__(self, model: nn.Module, loss: LossOf, group: Group, find_unused: bool, stopwatch: Stopwatch) -> None:
        super().__init__(model, loss)
        # DDP's forward is called once a micro-batch, however often, and by whichever methods, a task calls the model.
        self._ddp = group.data_parallel(LossModule(model, loss), find_unused)
        self._model = model
        self._world_size = group.world_size
        self._stopwatch = stopwatch

    def forward(self, batch: Batch, samples: range, *, last: bool) -> MicroBatchLoss:
        # As DDP's no_sync does: only the step's last backward talks to the others, the earlier ones just add up.
        self._ddp.require_backward_grad_sync = last
        with _lost_peers():  # in a generation's second step DDP's forward agrees on its buckets
            found: MicroBatchLoss = self._ddp(batch, samples)
        return found

    def backward(self, loss: Tensor, scale: Tensor, *, last: bool) -> None:
        self._stopwatch.halt()  # the last backward ends with waiting for the others' buckets
        with _lost_peers():
            (loss * self._world_size).backward(scale.to(loss.dtype))  # DDP averages, the sum is wanted
        if last:
            self._check_all_used()
        else:
            self._stopwatch.resume()

    def _check_all_used(self) -> None:
        """Raise UnusedParameters where DDP still waits for a gradient, which no backward will bring."""
        try:
            self._ddp._check_reducer_finalized()
        except RuntimeError as error:
            unused = [name for name, p in self._model.named_parameters() if p.requires_grad and p.grad is None]
            named = f" ({unused[0]}{' …' if len(unused) > 1 else ''})" if unused else ""
            raise UnusedParameters(
                f"parameters{named} got no gradient in this step; from the next generation on such steps are expected"
            ) from error

    def nonfinite_ranks(self) -> tuple[int, ...]:
        return ()  # summed in place: nobody can tell any more whose part it was


@contextlib.contextmanager
def _lost_peers() -> Iterator[None]:
    """Translate what DDP raises for a lost peer into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if is_lost_peer(error):
            raise PeerLost(in_short(error)) from error
        raise
