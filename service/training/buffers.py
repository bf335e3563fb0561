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
        sizes = [b.numel() for b in self._buffers]
        self.size = sum(sizes)
        if not self.size:
            return
        # One call for all of them: a deep network has dozens, and each call of its own costs.
        self._start = [b.clone() for b in self._buffers]
        device = self._buffers[0].device
        self._row = torch.empty(self.size, dtype=torch.float64, device=device)
        """All of them side by side, [size]."""
        pieces = zip(self._row.split(sizes), self._buffers, strict=True)
        self._pieces = [piece.view(b.shape) for piece, b in pieces]
        self._counts = torch.cat([
            torch.full((b.numel(),), not b.is_floating_point(), device=device) for b in self._buffers
        ])  # fmt: skip
        """Which entries of a row are whole numbers."""

    def begin(self) -> None:
        """A step begins with the values of now."""
        if self.size:
            torch._foreach_copy_(self._start, self._buffers)

    def restart(self) -> None:
        """Back to the values of the step's start."""
        if self.size:
            torch._foreach_copy_(self._buffers, self._start)

    def pack(self) -> Tensor:
        """The values of now, [size]; valid until the next call."""
        torch._foreach_copy_(self._pieces, self._buffers)
        return self._row

    def unpack(self, rows: Tensor) -> None:
        """Take the mean of [slots, size]."""
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        total /= rows.shape[0]
        self._row.copy_(torch.where(self._counts, rows[0], total))
        torch._foreach_copy_(self._buffers, self._pieces)
