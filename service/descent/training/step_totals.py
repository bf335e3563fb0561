"""The small vector that travels beside the gradients, so that every rank decides alike about the step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from descent.training.buffers import Buffers
from descent.training.collectives import Group, Work
from descent.training.results import MicroBatchLoss


@dataclass(frozen=True)
class ReducedTotals:
    """The totals after the sum over the ranks: the same numbers on every rank."""

    losses: list[float]
    """Loss sum of each slot."""
    counts: list[float]
    """Loss terms of each slot."""
    logged: Mapping[str, float]
    """The further means over all slots, by name; a mean of nothing is left out."""
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
        self,
        num_slots: int,
        buffers: Buffers,
        group: Group,
        votes: Sequence[int],
        report: Sequence[float],
        logged: Sequence[str] = (),
    ) -> None:
        """votes: summed over the ranks. report: numbers of this rank, kept apart from the others'.

        logged: the names of the further means that each loss brings.
        """
        self._num_slots, self._buffers, self._group, self._logged = num_slots, buffers, group, logged
        self._num_votes, self._report_length = len(votes), len(report)
        self._width = 2 + 2 * len(logged)
        """Numbers of a slot: loss sum, count, and a sum and a count for each further mean."""
        self._numbers = [0.0] * (self._width * num_slots) + [float(v) for v in votes]
        for rank in range(group.world_size):
            self._numbers += report if rank == group.rank else [0.0] * len(report)
        self._on_device: dict[int, Tensor] = {}
        self._rows = _NO_ROWS
        if buffers.row_length:
            self._rows = torch.zeros(num_slots, buffers.row_length, dtype=torch.float64, device=group.device)
        self._sent: Tensor | None = None
        self._work: Work | None = None

    def add(self, slot: int, loss: MicroBatchLoss) -> None:
        """Add the loss sum and the count of a micro-batch of `slot`, and its further means; 0-d tensors stay where they are."""
        place = self._width * slot
        self._add(place, loss.total.detach() if loss.reported is None else loss.reported)
        self._add(place + 1, loss.terms)
        for index, name in enumerate(self._logged, start=1):
            self._add(place + 2 * index, loss.logged[name].total)
            self._add(place + 2 * index + 1, loss.logged[name].count)

    def _add(self, place: int, number: Tensor | float) -> None:
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
        width, end = self._width, self._width * self._num_slots
        reports_begin = end + self._num_votes
        reports = [
            numbers[reports_begin + r * self._report_length : reports_begin + (r + 1) * self._report_length]
            for r in range(self._group.world_size)
        ]
        votes = tuple(int(v) for v in numbers[end:reports_begin])
        sums = [[sum(numbers[place:end:width]) for place in (2 * i, 2 * i + 1)] for i in range(1, width // 2)]
        logged = {n: total / count for n, (total, count) in zip(self._logged, sums, strict=True) if count}
        return ReducedTotals(numbers[0:end:width], numbers[1:end:width], logged, votes, reports, rows)
