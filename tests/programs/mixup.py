"""A vision transformer, with mixup drawn in the collate function, and averaged weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from tests.programs.pictures import Pictures
from tests.programs.program import Program, built, plain_loop

Batch = tuple[Tensor, Tensor]


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 4, 4)
        self.places = nn.Parameter(torch.zeros(1, 4, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.block(x).mean(1))


def mix(samples: list[tuple[Tensor, Tensor]]) -> Batch:
    """Each picture is mixed with another one of the batch, in a share that the batch draws."""
    images, labels = default_collate(samples)
    targets = F.one_hot(labels, 10).float()
    share, order = float(torch.rand(())), torch.randperm(len(images))
    return share * images + (1 - share) * images[order], share * targets + (1 - share) * targets[order]


def straight(samples: list[tuple[Tensor, Tensor]]) -> Batch:
    """Without mixing, for the comparison with a plain loop: only Descent knows how it seeds a batch's draws."""
    images, labels = default_collate(samples)
    return images, F.one_hot(labels, 10).float()


def by_hand() -> list[float]:
    return plain_loop(built(ViT), Pictures(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), collate=straight)


COMMON = [
    "model=custom",
    "model._target_=tests.programs.mixup.ViT",
    "data=custom",
    "data.train._target_=tests.programs.pictures.Pictures",
    "ema.decay=0.9",
]
PROGRAM = Program([*COMMON, "+data.collate._target_=tests.programs.mixup.straight"], by_hand)
DRAWS = [*COMMON, "+data.collate._target_=tests.programs.mixup.mix"]
