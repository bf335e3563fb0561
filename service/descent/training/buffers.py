"""Buffers that the forward changes: per slot from the step's start, then averaged."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from descent.errors import TrainingError


class Buffers:
    """Batch norm's statistics and the like, independent of who computes which slot.

    Each slot starts from the same values, as it would on a rank of its own, and the step
    ends with the mean over slots, summed in slot order; whole numbers (counters) take
    slot 0's. A module may write a buffer in place or put another tensor in its stead.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """names: those that the forward changes."""
        owners = {
            f"{path}.{name}".lstrip("."): (module._buffers, name)
            for path, module in model.named_modules()
            for name in module._buffers
        }
        self._places = [owners[name] for name in names]
        kept = model.state_dict(keep_vars=True).keys() & owners.keys()
        self._others = [(name, *owners[name]) for name in sorted(kept - set(names))]
        self._versions: list[tuple[int, int]] = []
        self._moved = False
        """Whether a forward of this step may have changed them."""
        sizes = [b.numel() for b in self._buffers]
        self.row_length = sum(sizes)
        if not self.row_length:
            return
        # One call for all of them: a deep network has dozens, and each call of its own costs.
        self._start = [b.clone() for b in self._buffers]
        device = self._start[0].device
        self._row = torch.empty(self.row_length, dtype=torch.float64, device=device)
        """All of them side by side, [size]."""
        pieces = zip(self._row.split(sizes), self._start, strict=True)
        self._pieces = [piece.view(b.shape) for piece, b in pieces]
        self._counts = torch.cat(
            [torch.full((b.numel(),), not b.is_floating_point(), device=device) for b in self._start]
        )
        """Which entries of a row are whole numbers."""

    @property
    def _buffers(self) -> list[Tensor]:
        return [owner[name] for owner, name in self._places]

    def _now(self) -> list[tuple[int, int]]:
        return [(id(t := owner[name]), t._version) for _, owner, name in self._others]

    def begin_step(self) -> None:
        """A step begins with the values of now."""
        self._versions = self._now()
        self._moved = False
        if self.row_length:
            torch._foreach_copy_(self._start, self._buffers)

    def check_constants(self, step: int) -> None:
        """Raises TrainingError where a buffer that is taken for a constant was written since the step began."""
        for (name, _, _), before, now in zip(self._others, self._versions, self._now(), strict=True):
            if before != now:
                raise TrainingError(
                    f"model: its buffer {name!r} changes from step {step} on, and was not written by the first "
                    "forward, when it was found out which do; write it in every forward in training "
                    "(add_(0) where there is nothing to change)"
                )

    def begin_slot(self) -> None:
        """Each slot begins with the values of the step's start."""
        if self._moved:
            self.restart()
        self._moved = True

    def restart(self) -> None:
        """Back to the values of the step's start."""
        if self.row_length:
            torch._foreach_copy_(self._buffers, self._start)

    def pack(self) -> Tensor:
        """The values of now, [size]; valid until the next call."""
        torch._foreach_copy_(self._pieces, self._buffers)
        return self._row

    def combine(self, rows: Tensor) -> None:
        """Take the mean of [slots, size]."""
        if not self.row_length:
            return
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        total /= rows.shape[0]
        self._row.copy_(torch.where(self._counts, rows[0], total))
        torch._foreach_copy_(self._buffers, self._pieces)
