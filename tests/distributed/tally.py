"""A training whose state is the count of how often each sample was spent."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

SAMPLES = 120
BATCH = 8
"""A power of two: the gradient's 1 / BATCH times the learning rate BATCH is 1 exactly."""
OVERRIDES = [
    "model=custom",
    "model._target_=tests.distributed.tally.Tally",
    "loss=mse",
    "loss._target_=torch.nn.L1Loss",
    "data=custom",
    "data.train._target_=tests.distributed.tally.Numbers",
    "data.holdout=0.0",
    "trusted_modules=[tests]",
    "optimizer=sgd",
    f"optimizer.lr={BATCH}",
    "optimizer.weight_decay=0.0",
    "schedule=constant",
    f"batch.size={BATCH}",
    "reduction=exact",
]


class Numbers(Dataset[tuple[Tensor, Tensor]]):
    """Sample i is the number i; its target is out of reach."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([float(index)]), torch.tensor(1e6)


class Tally(nn.Module):
    """One weight a sample. The absolute error's slope is 1, so each time a sample is spent its weight grows by 1."""

    def __init__(self) -> None:
        super().__init__()
        self.spent = nn.Parameter(torch.zeros(SAMPLES))

    def forward(self, numbers: Tensor) -> Tensor:
        return self.spent[numbers[:, 0].long()]
