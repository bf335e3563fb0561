"""A Siamese network: two pictures in, and whether both show one digit."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tests.programs.pictures import Pictures
from tests.programs.program import Program, built, plain_loop

Batch = tuple[Tensor, Tensor, Tensor]


class Pairs(Dataset[Batch]):
    def __init__(self) -> None:
        self.pictures = Pictures()

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Batch:
        (one, a), (other, b) = self.pictures[index], self.pictures[(index * 5 + 1) % 96]
        return one, other, (a == b).float()


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
        self.head = nn.Linear(32, 1)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.head(torch.cat([self.trunk(one), self.trunk(other)], 1)).squeeze(1)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    one, other, same = batch
    return F.binary_cross_entropy_with_logits(model(one, other), same)


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.siamese.Siamese",
        "data=custom",
        "data.train._target_=tests.programs.siamese.Pairs",
        "task=custom",
        "task._target_=tests.programs.siamese.loss",
    ],
    lambda: plain_loop(built(Siamese), Pairs(), loss),
)
