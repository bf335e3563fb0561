"""A U-Net with cross-entropy and Dice: Dice is computed over the whole batch, so it is coupled."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tests.programs.pictures import Pictures
from tests.programs.program import Program, built, plain_loop

Sample = dict[str, Tensor]


class Masks(Dataset[Sample]):
    def __init__(self) -> None:
        self.pictures = Pictures()

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Sample:
        image, _ = self.pictures[index]
        return {"image": image, "mask": (image[0] > 0.5).long()}


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x).relu()
        low = self.middle(F.max_pool2d(high, 2)).relu()
        return self.out(torch.cat([high, self.up(low)], 1))


def dice(probabilities: Tensor, mask: Tensor) -> Tensor:
    """1 - Dice of the class 1, over all pixels of a batch."""
    overlap = (probabilities * mask).sum()
    return 1 - (2 * overlap + 1) / (probabilities.sum() + mask.sum() + 1)


class Segmentation:
    def features(self, model: nn.Module, batch: Sample) -> dict[str, Tensor]:
        return {"logits": model(batch["image"]), "mask": batch["mask"]}

    def couple(self, features: dict[str, Tensor]) -> Tensor:
        logits, mask = features["logits"], features["mask"]
        return F.cross_entropy(logits, mask) + dice(logits.softmax(1)[:, 1], mask)


def by_hand() -> list[float]:
    def loss(model: nn.Module, batch: Sample) -> Tensor:
        logits = model(batch["image"])
        return F.cross_entropy(logits, batch["mask"]) + dice(logits.softmax(1)[:, 1], batch["mask"])

    return plain_loop(built(UNet), Masks(), loss)


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.segmentation.UNet",
        "data=custom",
        "data.train._target_=tests.programs.segmentation.Masks",
        "task=custom",
        "task._target_=tests.programs.segmentation.Segmentation",
    ],
    by_hand,
)
