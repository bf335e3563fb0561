"""Modules that keep things in buffers, as people write them."""

from typing import ClassVar

import torch
from torch import Tensor

from tests.hard_to_repeat import Plain


class Keeping(Plain):
    """Updates its buffer in training; what it gives doesn't depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", self.first())

    def first(self) -> Tensor:
        return torch.zeros(8)

    def update(self, rows: Tensor) -> Tensor:
        """The buffer after [n, 8] rows."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.kept = self.update(x.detach()[:, 0].mean(1))
        return super().forward(x)


class Largest(Keeping):
    def first(self) -> Tensor:
        return torch.full((8,), float("-inf"))

    def update(self, rows: Tensor) -> Tensor:
        return torch.maximum(self.kept, rows.amax(0))


class Smallest(Keeping):
    def update(self, rows: Tensor) -> Tensor:
        return torch.minimum(self.kept, -rows.amax(0))


class Total(Keeping):
    def update(self, rows: Tensor) -> Tensor:
        return self.kept + rows.sum(0)


class SamplesSeen(Keeping):
    """A whole number above 2**53 that grows by each sample."""

    def first(self) -> Tensor:
        return torch.tensor(2**60 + 1)

    def update(self, rows: Tensor) -> Tensor:
        return self.kept + len(rows)


class Average(Keeping):
    def update(self, rows: Tensor) -> Tensor:
        return 0.9 * self.kept + 0.1 * rows.mean(0)


class Variance(Keeping):
    """An average of what doesn't average itself."""

    def update(self, rows: Tensor) -> Tensor:
        return 0.9 * self.kept + 0.1 * rows.var(0, unbiased=False)


class Spectrum(Keeping):
    """Complex numbers, averaged."""

    def first(self) -> Tensor:
        return torch.zeros(8, dtype=torch.complex64)

    def update(self, rows: Tensor) -> Tensor:
        return 0.9 * self.kept + 0.1 * torch.fft.fft(rows + 0j).mean(0)


class Spread(Keeping):
    """An expanded tensor, after each forward again."""

    def first(self) -> Tensor:
        return torch.zeros(1).expand(8)

    def update(self, rows: Tensor) -> Tensor:
        return (0.9 * self.kept[:1] + 0.1 * rows.mean()).expand(8)


class Steps(Keeping):
    def first(self) -> Tensor:
        return torch.zeros((), dtype=torch.int32)

    def update(self, rows: Tensor) -> Tensor:  # noqa: ARG002
        return self.kept + 1


class AnyBright(Keeping):
    """A flag that some samples set."""

    def first(self) -> Tensor:
        return torch.zeros(8, dtype=torch.bool)

    def update(self, rows: Tensor) -> Tensor:
        return self.kept | (rows > 0.6).any(0)


class Queue(Keeping):
    """The last samples, whichever they were."""

    def update(self, rows: Tensor) -> Tensor:
        return torch.cat([self.kept, rows[:, 3]])[-8:]


class StatedQueue(Queue):
    combine_buffers: ClassVar = {"kept": "same"}


class StatedWrongly(Queue):
    combine_buffers: ClassVar = {"kept": "median"}


class LateFlag(Keeping):
    """Depends on samples, but on none of the first ones."""

    def first(self) -> Tensor:
        return torch.zeros((), dtype=torch.bool)

    def update(self, rows: Tensor) -> Tensor:
        return self.kept | bool(len(rows) == 6 and rows.sum() > self.threshold)

    threshold = 15.3
