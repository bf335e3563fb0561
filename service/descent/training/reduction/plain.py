"""The two reducers that are torch's own: autograd's accumulation, and DDP."""

import contextlib
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from descent.training.collectives import Group, PeerLost, in_short, is_lost_peer


class Solo:
    """One replica: autograd's own accumulation is the whole reduction."""

    backward_is_local = True

    def __init__(self, model: nn.Module) -> None:
        self.forward = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def begin(self) -> None:
        for p in self._parameters:
            p.grad = None

    def backward(self, loss: Callable[[], Tensor], scale: Tensor, last: bool, before: Callable[[], None]) -> None:
        value = loss()
        if last:
            before()
        value.backward(scale.to(value.dtype))

    def end_slot(self, slot: int, last: bool) -> None:
        pass

    def finish(self) -> None:
        pass

    def nonfinite_ranks(self) -> tuple[int, ...]:
        return (0,)

    def deal(self, shares: Sequence[tuple[int, int]]) -> None:
        pass


class Fast(Solo):
    """torch's DDP: buckets travel while the backward still runs."""

    backward_is_local = False  # it ends with waiting for the others' buckets

    def __init__(self, model: nn.Module, group: Group, find_unused: bool) -> None:
        super().__init__(model)
        self.forward = self._ddp = group.data_parallel(model, find_unused)
        self._world_size = group.world_size

    def backward(self, loss: Callable[[], Tensor], scale: Tensor, last: bool, before: Callable[[], None]) -> None:
        # Only the step's last backward talks to the others; earlier micro-batches just add up.
        with contextlib.nullcontext() if last else self._ddp.no_sync():
            try:
                # The forward talks too: in its second step the reducer agrees on its buckets.
                value = loss() * self._world_size  # the reducer averages, we want the sum
                if last:
                    before()
                value.backward(scale.to(value.dtype))
            except RuntimeError as error:
                if is_lost_peer(error):
                    raise PeerLost(in_short(error)) from error
                raise

    def nonfinite_ranks(self) -> tuple[int, ...]:
        return ()  # summed in place: nobody can tell any more whose part it was
