"""Fine-tuning: the backbone is frozen for three steps, then trained at a tenth of the head's learning rate."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.programs.pictures import Pictures
from tests.programs.program import Program, built, plain_loop

RELEASED = 4
"""The first step that trains the backbone."""


class FineTuned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def by_hand() -> list[float]:
    model = built(FineTuned)
    backbone, head = model.backbone, model.head
    groups = [{"params": head.parameters()}, {"params": backbone.parameters(), "lr": 0.005}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    steps = iter(range(1, 100))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        backbone.requires_grad_(next(steps) >= RELEASED)
        return F.cross_entropy(model(batch[0]), batch[1])

    return plain_loop(model, Pictures(), loss, optimizer=optimizer)


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.frozen_backbone.FineTuned",
        "data=custom",
        "data.train._target_=tests.programs.pictures.Pictures",
        "+optimizer.momentum=0.9",
        f"optimizer.groups=[{{match: '^backbone', lr_scale: 0.1, from_step: {RELEASED}}}]",
    ],
    by_hand,
)
