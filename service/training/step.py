"""One optimizer step: slots and their micro-batches, the reduction, clipping, the update.

The step commits on all replicas or on none: everything that can fail happens before
the update, and what decides about it (losses, votes) travels to every rank in one
small vector beside the gradients.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from service.training.collectives import Group
from service.training.objective import Objective
from service.training.reduction import Reducer
from service.training.sampling import stream_seed

Fetch = Callable[[int, int], tuple[Tensor, Tensor]]
"""(first, stop) within the step's global batch -> inputs [n, …], targets [n, …] on the device."""


@dataclass(frozen=True)
class StepInput:
    """What one rank computes in one step."""

    step: int
    seed: int
    slots: Sequence[tuple[int, tuple[int, int]]]
    """(slot, its range within the global batch) for the slots of this rank."""
    num_slots: int
    micro_size: int
    nominal: float
    """What the gradient is divided by: the expected number of loss terms in the global batch."""
    scale: Tensor
    """1 / nominal, a 0-d tensor on the device: where the backward starts."""


@dataclass(frozen=True)
class StepResult:
    """The same on every rank."""

    loss: float
    """Mean loss over the global batch."""
    gradient_norm: float
    """Before clipping; inf or nan where a gradient isn't finite."""
    committed: bool
    votes: tuple[int, ...]
    slot_losses: tuple[float, ...]


class Buffers:
    """Buffers that the forward changes (batch norm's statistics): per slot from the step's start, then averaged.

    Each slot starts from the same values, as it would on a rank of its own, and the step
    ends with the mean over slots, summed in slot order; whole numbers (counters) take
    slot 0's. So they don't depend on who computed which slot.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        owned = dict(model.named_buffers())
        self._buffers = [owned[name] for name in names]
        self.size = sum(b.numel() for b in self._buffers)
        self._start: list[Tensor] = []

    def begin(self) -> None:
        self._start = [b.clone() for b in self._buffers]

    def restart(self) -> None:
        """Back to the values of the step's start."""
        for buffer, start in zip(self._buffers, self._start, strict=True):
            buffer.copy_(start)

    def pack(self) -> Tensor:
        return torch.cat([b.reshape(-1).to(torch.float64) for b in self._buffers])

    def unpack(self, rows: Tensor) -> None:
        """Take the mean of [slots, size]."""
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        mean, offset = total / rows.shape[0], 0
        for buffer in self._buffers:
            piece = slice(offset, offset + buffer.numel())
            source = mean if buffer.is_floating_point() else rows[0]
            buffer.copy_(source[piece].view_as(buffer))
            offset += buffer.numel()


class _Side:
    """The small vector that travels beside the gradients: per slot loss sum and count, the votes, the buffers.

    Each entry has one owner and the others add zero, so the sum over ranks is exact
    whatever way it is computed. On a CPU the numbers stay Python's until they are sent.
    """

    def __init__(
        self, given: StepInput, buffers: Buffers, group: Group, votes: Sequence[int]
    ) -> None:
        self._slots, self._buffers, self._group = given.num_slots, buffers, group
        self._numbers = [0.0] * (2 * given.num_slots) + [float(v) for v in votes]
        self._on_device: dict[int, Tensor] = {}
        self._rows = torch.zeros(
            given.num_slots, buffers.size, dtype=torch.float64, device=group.device
        )
        self._sent: Tensor | None = None
        self._work: object = None

    def add(self, slot: int, loss: Tensor, count: Tensor | int) -> None:
        """Count in a micro-batch of `slot`."""
        for place, number in ((2 * slot, loss.detach()), (2 * slot + 1, count)):
            if isinstance(number, Tensor) and number.device.type != "cpu":
                # Reading it now would make the host wait for the device.
                self._on_device[place] = self._on_device.get(place, 0.0) + number.double()
            else:
                self._numbers[place] += float(number)

    def end_slot(self, slot: int) -> None:
        """Take the buffers as the slot's forwards have left them."""
        if self._buffers.size:
            self._rows[slot] = self._buffers.pack()

    def send(self) -> None:
        """Start the sum over all ranks."""
        if self._group.world_size == 1 and not self._on_device:
            return
        numbers = torch.tensor(self._numbers, dtype=torch.float64).to(self._group.device)
        for place, number in self._on_device.items():
            numbers[place] = number
        self._sent = torch.cat([numbers, self._rows.flatten()]) if self._buffers.size else numbers
        self._work = self._group.sum_async(self._sent)

    def receive(self) -> tuple[list[float], list[float], tuple[int, ...], Tensor]:
        """Loss sums and counts per slot, votes, and buffers [slots, size]; the same on every rank."""
        self._group.wait(self._work)
        numbers, rows = self._numbers, self._rows
        if self._sent is not None:
            numbers = self._sent[: len(self._numbers)].tolist()
            rows = self._sent[len(self._numbers) :].view_as(self._rows)
        end = 2 * self._slots
        return numbers[0:end:2], numbers[1:end:2], tuple(int(v) for v in numbers[end:]), rows


def train_step(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, objective: Objective,
    reducer: Reducer, group: Group, buffers: Buffers, fetch: Fetch, given: StepInput, *,
    autocast: Callable[[], AbstractContextManager[Any]], random: bool, votes: Sequence[int],
    clip_norm: float | None, clip_value: float | None, enter: Callable[[str], None] = lambda _: None,
) -> StepResult:  # fmt: skip
    """Compute this rank's slots, reduce with the others, and update unless something isn't finite.

    `enter` is told the phases: forward, reduce (the side vector is sent, the last backward
    begins), update.
    Raises PeerLost when a collective can't be finished; the model is then still at the
    last committed step.
    """
    side = _Side(given, buffers, group, votes)
    if buffers.size:
        buffers.begin()
    reducer.begin()
    try:
        enter("forward")
        for index, (slot, (lo, hi)) in enumerate(given.slots):
            last_slot = index == len(given.slots) - 1
            if random:
                torch.manual_seed(stream_seed(given.seed, given.step, slot))
            if buffers.size and index:
                buffers.restart()
            for start in range(lo, hi, given.micro_size):
                stop = min(start + given.micro_size, hi)
                last = last_slot and stop == hi
                inputs, targets = fetch(start, stop)

                def loss(
                    inputs: Tensor = inputs, targets: Tensor = targets, slot: int = slot
                ) -> Tensor:
                    with autocast():
                        output = reducer.forward(inputs)
                    value = objective(output, targets)
                    side.add(slot, value, objective.count(targets))
                    return value

                def send(slot: int = slot) -> None:
                    side.end_slot(slot)
                    side.send()
                    enter("reduce")

                reducer.backward(loss, given.scale, last, send)
            if not last_slot:
                side.end_slot(slot)
            reducer.end_slot(slot, last_slot)
        sums = side.receive()
        reducer.finish()
        enter("update")
    except BaseException:
        # The step will run again, in another generation: what the forward moved goes back.
        buffers.restart()
        raise
    return _commit(parameters, optimizer, buffers, sums, given, clip_norm, clip_value)


def _commit(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, buffers: Buffers,
    sums: tuple[list[float], list[float], tuple[int, ...], Tensor], given: StepInput,
    clip_norm: float | None, clip_value: float | None,
) -> StepResult:  # fmt: skip
    """The step's last act: everyone holds the same sums, so everyone decides the same."""
    losses, counts, votes, rows = sums
    count = sum(counts) or 1.0  # nothing to learn from: all labels ignored
    gradients = [p.grad for p in parameters if p.grad is not None]
    if count != given.nominal:
        torch._foreach_mul_(gradients, given.nominal / count)
    norm = gradient_norm(gradients)
    loss = sum(losses) / count
    committed = norm < float("inf") and loss - loss == 0.0
    if committed:
        if clip_norm is not None and norm > clip_norm:
            torch._foreach_mul_(gradients, clip_norm / (norm + 1e-6))
        if clip_value is not None:
            torch._foreach_clamp_min_(gradients, -clip_value)
            torch._foreach_clamp_max_(gradients, clip_value)
        optimizer.step()
        if buffers.size:
            buffers.unpack(rows)
    elif buffers.size:
        buffers.restart()
    return StepResult(loss, norm, committed, votes, tuple(losses))


def gradient_norm(gradients: list[Tensor]) -> float:
    """The 2-norm over all entries; not finite if one of them isn't."""
    if not gradients:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))


def layer_norms(model: nn.Module) -> dict[str, float]:
    """Gradient 2-norm per layer (the module that owns the parameters), in the model's order."""
    names, gradients = [], []
    for name, p in model.named_parameters():
        if p.grad is not None:
            names.append(name.rpartition(".")[0] or name)
            gradients.append(p.grad)
    if not gradients:
        return {}
    squares: dict[str, float] = {}
    for name, norm in zip(names, torch.stack(torch._foreach_norm(gradients)).tolist(), strict=True):
        squares[name] = squares.get(name, 0.0) + norm * norm
    return {name: total**0.5 for name, total in squares.items()}
