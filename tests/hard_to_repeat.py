"""Models as people write them, whose bits depend on more than weights and samples unless somebody sees to it."""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Plain(nn.Module):
    """A linear classifier of 8 × 8 digits, for the others to spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


class LookedUp(Plain):
    """By `[index]`: threads add its gradient up as they come, unless told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(17, 16).weight, nn.Linear(64 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.table[(16 * x).long()].tanh())


class AlwaysDrawing(Plain):
    """In evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gumbel_softmax(super().forward(x), hard=True)


class DrawingElsewhere(Plain):
    """From Python's and NumPy's generators."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 + random.random() + np.random.rand())


class DrawingLate(Plain):
    """From the third forward on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.forwards += 1
            x = F.dropout(x, 0.3) if self.forwards > 2 else x
        return super().forward(x)


class Centred(Plain):
    """Its buffer is another tensor after each forward."""

    persistent = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 8, 8), persistent=self.persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return super().forward(x - self.mean)


class Lazy(Plain):
    """Has no shapes before its first forward, and a cache only after it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(10)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "cache"):
            self.register_buffer("cache", torch.full((8, 8), 0.5), persistent=False)
        return super().forward(x * self.cache)


class Forgetful(Centred):
    """Its buffer is not in its state_dict."""

    persistent = False


class LateBuffer(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "mean"):
            self.register_buffer("mean", x.detach().mean(0))
        return super().forward(x)


class Counting(Plain):
    """In an attribute that is no buffer."""

    forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return super().forward(x) * self.forwards


class SetByTheFirstBatch(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(8, 8))
        self.register_buffer("is_set", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_set:
            self.shift.data.copy_(x.detach().mean((0, 1)))
            self.is_set.fill_(True)
        return super().forward(x - self.shift)


class BuiltByNumpy(Plain):
    """Its first weights are drawn by Python's and NumPy's generators, which `seed` decides too."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.from_numpy(np.random.rand(64)).float() * random.random())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1) + self.shift)


class BuiltByItsOwnGenerator(BuiltByNumpy):
    """Nobody seeds it."""

    def __init__(self) -> None:
        super().__init__()
        self.shift.data = torch.from_numpy(np.random.default_rng().random(64)).float()


class OtherLayouts(Plain):
    """Its parameters lie in memory in other ways than row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1, stride=2).to(memory_format=torch.channels_last)
        self.second = nn.Conv2d(6, 8, 3, padding=1, stride=2).to(memory_format=torch.channels_last)
        self.mixed = nn.Parameter(torch.randn(32, 40).T / 6)
        self.slice = nn.Parameter(torch.randn(40, 24)[:, 3:15] / 6)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).relu()).relu().flatten(1) @ self.mixed.T
        return super().forward(hidden.tanh() @ self.slice)


class LaidOutByItsForward(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.head = nn.Linear(6 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data = self.conv.weight.data.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        return super().forward(self.conv(x))


class Expanded(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1).expand(64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1) * self.scale)


class WithoutDeterministicKernel(Plain):
    def forward(self, x: Tensor) -> Tensor:
        pooled, at = F.max_pool2d(x, 2, return_indices=True)
        return super().forward(F.max_unpool2d(pooled, at, 2))


class InOneDtype(Plain):
    """Can't be computed in mixed precision."""

    def forward(self, x: Tensor) -> Tensor:
        at = torch.zeros(len(x), 1, dtype=torch.int64)
        return torch.zeros(len(x), 10).scatter_add(1, at.expand(-1, 10), super().forward(x))


def overrides(model: type[nn.Module]) -> list[str]:
    """What lets a run train this model."""
    return ["model=custom", f"model._target_={__name__}.{model.__qualname__}", "trusted_modules=[tests]"]
