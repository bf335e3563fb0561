"""What a program of this folder states about itself, and the plain PyTorch loop that it is compared with."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from descent.training.input.sampling import SampleOrder, stream_seed

STEPS, BATCH = 6, 12
RUN = (
    "optimizer=sgd",
    "optimizer.lr=0.05",
    "schedule=constant",
    f"batch.size={BATCH}",
    f"steps={STEPS}",
    "epochs=null",
    "data.holdout=0",
    "checkpoint.every=3",
    "trusted_modules=[tests]",
    "reduction=exact",
)
"""What is the same for all programs: the plain loop takes these for granted."""


@dataclass(frozen=True)
class Program:
    """A training in the form that its own community writes, and the same by hand."""

    overrides: Sequence[str]
    """What a user types to bring the program, beside `RUN`."""
    by_hand: Callable[[], list[float]]
    """The loss of each of the `STEPS` steps by a plain loop, with batches of `BATCH`."""
    slots: Sequence[int] = (1, 2)
    """Numbers of slots with which the losses are the plain loop's."""
    tolerance: float = 1e-4
    """Relative difference that rounding explains."""


def plain_loop(
    model: nn.Module,
    data: Any,
    loss_of: Callable[[nn.Module, Any], Tensor],
    *,
    collate: Callable[[list[Any]], Any] = torch.utils.data.default_collate,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """The losses of a loop as everybody writes it. Each step draws from the generator that slot 0 has in that step."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    model.train()
    for step, batch in enumerate(batches(data, collate), start=1):
        draw_as_in(step)
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def batches(data: Any, collate: Callable[[list[Any]], Any] = torch.utils.data.default_collate) -> Iterable[Any]:
    """The batch of each step, in Descent's order of the samples."""
    order = SampleOrder(len(data), BATCH, 0)
    for step in range(1, STEPS + 1):
        yield collate([data[i] for i in order.samples_of(step).tolist()])


def draw_as_in(step: int) -> None:
    """Random numbers as the only slot of this step draws them."""
    torch.manual_seed(stream_seed(0, step, 0))


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with the initial weights of seed 0."""
    torch.manual_seed(0)
    return make()
