"""Losses as people write them, whose number for a batch isn't simply a mean over its samples."""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

VALID = -1.0
"""A target that counts for nothing in `ValidMean`."""


class FocalAroundAMean(nn.Module):
    """The mean of all samples goes through a function that isn't linear."""

    def __init__(self, gamma: float = 2.0, reduction: str = "mean") -> None:
        super().__init__()
        self.gamma, self.reduction = gamma, reduction

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target, reduction=self.reduction)
        return (1 - torch.exp(-loss)) ** self.gamma * loss


class Focal(nn.CrossEntropyLoss):
    """Derived from torch's; each sample for itself, then their mean."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target, reduction="none")
        return ((1 - torch.exp(-loss)) ** 2 * loss).mean()


class SmoothedAsTorch(nn.CrossEntropyLoss):
    """Derived from torch's without a forward of its own."""


class Sum(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="sum")


class EvenMean(nn.Module):
    """Only even labels count, and only they are divided by."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        counts = target % 2 == 0
        return F.cross_entropy(output[counts], target[counts])


class EvenPair(nn.Module):
    """The same as its total and its count."""

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        counts = target % 2 == 0
        return F.cross_entropy(output[counts], target[counts], reduction="sum"), counts.sum()


class PairThatDoesNotAdd(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, int]:
        return F.cross_entropy(output, target), len(target)


class NegativeCount(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, int]:
        return F.cross_entropy(output, target, reduction="sum"), -len(target)


class Contrastive(nn.Module):
    """Compares the samples of a batch with each other."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        likeness = output @ output.T - 1e3 * torch.eye(len(output))
        return F.cross_entropy(likeness, (target[:, None] == target).float().argmax(1))


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output * self.temperature, target)


class Tempered(nn.Module):
    """A model that holds the temperature, which only its loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


def tempered(model: Tempered, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]) * model.temperature, batch[1])


class TrainedInside(nn.Module):
    """Its parameter lies in a layer, and it calls its inner loss `loss`."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.loss = nn.Linear(10, 10), nn.CrossEntropyLoss()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        found: Tensor = self.loss(self.head(output), target)
        return found


class TrainedInAnObject:
    """The same, and no module itself."""

    def __init__(self) -> None:
        self.head = nn.Linear(10, 10)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.head(output), target)


class Running(nn.Module):
    """Its buffer changes with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(output, target)
        self.scale = 0.9 * self.scale + 0.1 * loss.detach()
        return loss / self.scale


class Counting(nn.Module):
    """Its number of calls changes nothing yet."""

    calls = 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(output, target) * (1.0 if self.calls < 1000 else 0.5)


def remembering() -> object:
    """A function whose memory is a closure's."""
    calls = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(output, target)

    return loss


class OwnGenerator(nn.Module):
    """Draws from a generator that nobody seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * (1.0 + float(self.rng.random()))


class DrawnByNumpy(nn.Module):
    """A weight for each class, drawn once as the loss is built."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(np.random.rand(10)).float())

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(output, target, weight=self.weight, reduction="sum")
        return loss, self.weight[target].sum()


class DrawnByItsOwnGenerator(DrawnByNumpy):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.from_numpy(np.random.default_rng().random(10)).float()


class DrawsFromTorch(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output + 0.1 * torch.randn_like(output), target)


class DrawsElsewhere(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * (1.0 + random.random() + np.random.rand())


class Probabilities(Dataset[tuple[Tensor, Tensor]]):
    """Points of three classes; the target is the probability of each class."""

    num_outputs = 3

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        kind = index % 3
        inputs = torch.randn(4, generator=generator) + 3.0 * torch.eye(4)[kind]
        return inputs, torch.full((3,), 0.1) + 0.7 * torch.eye(3)[kind]


class FloatLabels(Probabilities):
    """The class as a floating-point number; in a row of its own where `row`."""

    def __init__(self, row: bool = False) -> None:
        self.row = row

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        label = torch.tensor(float(index % 3))
        return super().__getitem__(index)[0], label[None] if self.row else label


class AllIgnored(Probabilities):
    """No label counts."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return super().__getitem__(index)[0], torch.tensor(-100)


class Places(Dataset[tuple[Tensor, Tensor]]):
    """One class for each of three places, of three classes; or tokens, whole numbers."""

    num_outputs = 3

    def __init__(self, tokens: bool = False) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randn(3, generator=generator)
        return (inputs.abs() * 2).long().clamp(0, 2) if self.tokens else inputs, (inputs > 0).long() + (
            inputs > 1
        ).long()


class ThreeByThree(nn.Module):
    """[n, 3] to [n, 3, 3]."""

    def __init__(self, classes_last: bool | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 9)
        if classes_last is not None:
            self.classes_last = classes_last

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.float()).view(-1, 3, 3)


class SparseLookUp(nn.Module):
    """A table whose gradient holds the rows that were looked up, and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(17, 4)), nn.Linear(64 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.embedding((16 * x).long().flatten(1), self.table, sparse=True).flatten(1))
