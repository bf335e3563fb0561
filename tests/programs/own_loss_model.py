"""A model that takes one tensor and returns its loss, as the autoregressive wrapper of x-transformers does."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tests.programs.program import Program, built, plain_loop


class Sequences(Dataset[Tensor]):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Tensor:
        return (torch.arange(9) * (1 + index % 4) + index) % 11


class Autoregressive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(11, 12), nn.GRU(12, 12, batch_first=True), nn.Linear(12, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.rnn(self.embed(tokens[:, :-1]))[0])
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.own_loss_model.Autoregressive",
        "data=custom",
        "data.train._target_=tests.programs.own_loss_model.Sequences",
        "task=auto",
    ],
    lambda: plain_loop(built(Autoregressive), Sequences(), lambda model, tokens: model(tokens)),
)
