"""How the slots' gradients become one gradient: several reducers behind one interface.

`Solo` for one replica of one slot range where bits across sizes don't matter, `Fast`
on DDP's overlapped reducer, `Compressed` where fewer bytes shall travel, `Exact` on one
fixed pairwise tree over slot numbers.
All leave the *sum* over the global batch, times `scale`, in `p.grad`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from descent.training.collectives import Group
from descent.training.reduction.compressed import Compressed
from descent.training.reduction.exact import Exact
from descent.training.reduction.plain import Fast, Solo


class Reducer(Protocol):
    """One step: `begin`, then per slot some `backward`s and `end_slot`, then `finish`."""

    @property
    def backward_is_local(self) -> bool:
        """Whether the time of a backward is this rank's own, without waiting for others."""
        ...

    @property
    def forward(self) -> Callable[..., Tensor]: ...
    def begin(self) -> None: ...
    def backward(self, loss: Callable[[], Tensor], scale: Tensor, last: bool, before: Callable[[], None]) -> None: ...
    def end_slot(self, slot: int, last: bool) -> None: ...
    def finish(self) -> None: ...

    def nonfinite_ranks(self) -> tuple[int, ...]:
        """After `finish`: the step is not committed. The ranks that are known to have spoilt it."""
        ...

    def deal(self, shares: Sequence[tuple[int, int]]) -> None:
        """Between steps: the ranks hold these slots from now on."""
        ...


@contextlib.contextmanager
def reducer_for(
    model: nn.Module,
    group: Group,
    *,
    kind: str,
    compress: str | None,
    shares: Sequence[tuple[int, int]],
    slots: int,
    find_unused: bool,
) -> Iterator[Reducer]:
    """The reducer for one generation; its hooks are gone when the generation ends."""
    if group.world_size == 1 and (slots == 1 or kind == "fast"):
        yield Solo(model)
    elif kind == "fast" and compress is None:
        yield Fast(model, group, find_unused)
    else:
        made = Exact(model, group, shares, slots) if compress is None else Compressed(model, group, compress)
        with contextlib.closing(made):
            yield made
