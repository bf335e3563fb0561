"""The small vector that travels beside the gradients and lets all ranks decide alike."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from descent.training.buffers import Buffers
from descent.training.collectives import Group


@dataclass(frozen=True)
class ReducedTotals:
    """What has arrived; the same on every rank."""

    losses: list[float]
    """Loss sum per slot."""
    counts: list[float]
    """Loss terms per slot."""
    votes: tuple[int, ...]
    by_rank: list[list[float]]
    """What each rank said of itself."""
    rows: Tensor
    """Buffers as each slot's forwards have left them, [slots, size]."""


_NO_ROWS = torch.zeros(0, 0, dtype=torch.float64)


class StepTotals:
    """Per slot loss sum and count, the votes, what each rank says of itself, the buffers.

    Each entry has one owner and the others add zero, so the sum over ranks is exact
    whatever way it is computed. On a CPU the numbers stay Python's until they are sent.
    """

    def __init__(
        self,
        num_slots: int,
        buffers: Buffers,
        group: Group,
        votes: Sequence[int],
        own: Sequence[float],
    ) -> None:
        self._slots, self._buffers, self._group = num_slots, buffers, group
        self._num_votes, self._num_own = len(votes), len(own)
        self._numbers = [0.0] * (2 * num_slots) + [float(v) for v in votes]
        for rank in range(group.world_size):
            self._numbers += own if rank == group.rank else [0.0] * len(own)
        self._on_device: dict[int, Tensor] = {}
        self._rows = (
            torch.zeros(num_slots, buffers.size, dtype=torch.float64, device=group.device) if buffers.size else _NO_ROWS
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

    def receive(self) -> ReducedTotals:
        """Wait for the sum. Raises PeerLost."""
        self._group.wait(self._work)
        numbers, rows = self._numbers, self._rows
        if self._sent is not None:
            numbers = self._sent[: len(self._numbers)].tolist()
            if self._buffers.size:
                rows = self._sent[len(self._numbers) :].view_as(self._rows)
        end = 2 * self._slots
        own_from = end + self._num_votes
        by_rank = [
            numbers[own_from + r * self._num_own : own_from + (r + 1) * self._num_own]
            for r in range(self._group.world_size)
        ]
        votes = tuple(int(v) for v in numbers[end:own_from])
        return ReducedTotals(numbers[0:end:2], numbers[1:end:2], votes, by_rank, rows)
