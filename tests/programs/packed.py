"""A recurrent classifier on packed sequences."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import Dataset

from tests.programs.program import Program, built, plain_loop

Sample = tuple[Tensor, int]
Batch = tuple[PackedSequence, Tensor]


class Series(Dataset[Sample]):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Sample:
        return torch.sin(torch.arange(3 + index % 6) * (0.3 + 0.2 * (index % 3)))[:, None], index % 3


def pack(samples: list[Sample]) -> Batch:
    return pack_sequence([series for series, _ in samples], enforce_sorted=False), torch.tensor([c for _, c in samples])


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(1, 12), nn.Linear(12, 3)

    def forward(self, packed: PackedSequence) -> Tensor:
        return self.head(self.rnn(packed)[1][0][-1])


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.packed.Classifier",
        "data=custom",
        "data.train._target_=tests.programs.packed.Series",
        "+data.collate._target_=tests.programs.packed.pack",
        "task=custom",
        "task._target_=tests.programs.packed.loss",
    ],
    lambda: plain_loop(built(Classifier), Series(), loss, collate=pack),
)
