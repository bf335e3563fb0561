"""Prediction of sine waves in double precision, as PyTorch's example has it, with Adam instead of L-BFGS."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.programs.program import Program, built, plain_loop

Pair = tuple[np.ndarray, np.ndarray]


class Waves(Dataset[Pair]):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Pair:
        wave = np.sin(np.arange(11) / 2 + index)
        return wave[:-1], wave[1:]


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(1, 8), nn.Linear(8, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(len(x), 8, dtype=torch.double)
        outputs = []
        for value in x.split(1, dim=1):
            h, c = self.cell(value, (h, c))
            outputs.append(self.out(h))
        return torch.cat(outputs, 1)


def by_hand() -> list[float]:
    model = built(Sequence)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return plain_loop(model, Waves(), lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), optimizer=optimizer)


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.time_sequence.Sequence",
        "data=custom",
        "data.train._target_=tests.programs.time_sequence.Waves",
        "loss=mse",
        "optimizer=adam",
        "optimizer.lr=0.01",
    ],
    by_hand,
    tolerance=1e-9,
)
