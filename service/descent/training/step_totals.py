"""The small vector that travels beside the gradients, so that every rank decides alike about the step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from descent.training.buffers import Buffers
from descent.training.collectives import Group, Work


@dataclass(frozen=True)
class ReducedTotals:
    """The totals after the sum over the ranks: the same numbers on every rank."""

    losses: list[float]
    """Loss sum of each slot."""
    counts: list[float]
    """Loss terms of each slot."""
    votes: tuple[int, ...]
    """Sums of the ranks' votes."""
    reports: list[list[float]]
    """Each rank's report."""
    buffer_rows: Tensor
    """The changing buffers after each slot's forwards, as `Buffers.pack` lays them out: [slots, row length]."""


_NO_ROWS = torch.zeros(0, 0, dtype=torch.float64)


class StepTotals:
    """One rank's part of the totals: loss sum and count of each slot, votes, the rank's report, changing buffers.

    Each entry belongs to one rank and the others add zero, so the sum over the ranks is exact in
    whatever order it is computed. On a CPU the numbers stay Python's until they are sent.
    """

    def __init__(
        self, num_slots: int, buffers: Buffers, group: Group, votes: Sequence[int], report: Sequence[float]
    ) -> None:
        """votes: summed over the ranks. report: numbers of this rank, kept apart from the others'."""
        self._num_slots, self._buffers, self._group = num_slots, buffers, group
        self._num_votes, self._report_length = len(votes), len(report)
        self._numbers = [0.0] * (2 * num_slots) + [float(v) for v in votes]
        for rank in range(group.world_size):
            self._numbers += report if rank == group.rank else [0.0] * len(report)
        self._on_device: dict[int, Tensor] = {}
        self._rows = _NO_ROWS
        if buffers.row_length:
            self._rows = torch.zeros(num_slots, buffers.row_length, dtype=torch.float64, device=group.device)
        self._sent: Tensor | None = None
        self._work: Work | None = None

    def add(self, slot: int, loss: Tensor, count: Tensor | float) -> None:
        """Add the loss sum and the count of a micro-batch of `slot`; 0-d tensors stay where they are."""
        for place, number in ((2 * slot, loss.detach()), (2 * slot + 1, count)):
            if isinstance(number, Tensor) and number.device.type != "cpu":
                # Reading it now would make the host wait for the device.
                self._on_device[place] = self._on_device.get(place, 0.0) + number.double()
            else:
                self._numbers[place] += float(number)

    def add_buffers(self, slot: int) -> None:
        """Keep the buffers as the forwards of `slot` have left them."""
        if self._buffers.row_length:
            self._rows[slot] = self._buffers.pack()

    def start_sum(self) -> None:
        """Start the sum over the ranks; nothing may be added afterwards."""
        if self._group.world_size == 1 and not self._on_device:
            return
        numbers = torch.tensor(self._numbers, dtype=torch.float64).to(self._group.device)
        for place, number in self._on_device.items():
            numbers[place] = number
        self._sent = torch.cat([numbers, self._rows.flatten()]) if self._buffers.row_length else numbers
        self._work = self._group.sum_async(self._sent)

    def wait(self) -> ReducedTotals:
        """Wait for the sum over the ranks. Raises PeerLost."""
        self._group.wait(self._work)
        numbers, rows = self._numbers, self._rows
        if self._sent is not None:
            numbers = self._sent[: len(self._numbers)].tolist()
            if self._buffers.row_length:
                rows = self._sent[len(self._numbers) :].view_as(self._rows)
        end = 2 * self._num_slots
        reports_begin = end + self._num_votes
        reports = [
            numbers[reports_begin + r * self._report_length : reports_begin + (r + 1) * self._report_length]
            for r in range(self._group.world_size)
        ]
        votes = tuple(int(v) for v in numbers[end:reports_begin])
        return ReducedTotals(numbers[0:end:2], numbers[1:end:2], votes, reports, rows)
