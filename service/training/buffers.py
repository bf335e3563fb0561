"""Buffers that the forward changes: per slot from the step's start, then averaged."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Buffers:
    """Batch norm's statistics and the like, independent of who computes which slot.

    Each slot starts from the same values, as it would on a rank of its own, and the step
    ends with the mean over slots, summed in slot order; whole numbers (counters) take
    slot 0's.
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
