"""A transformer for tables: numbers and categories as two inputs of different types, the target is a number."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tests.programs.program import Program, built, plain_loop

Sample = tuple[tuple[Tensor, Tensor], Tensor]


class Table(Dataset[Sample]):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Sample:
        numbers = torch.tensor([index / 96, (index % 7) / 7, (index % 5) / 5])
        kinds = torch.tensor([index % 3, index % 4])
        return (numbers, kinds), numbers.sum() + kinds[0]


class FTTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.of_numbers, self.of_kinds = nn.Parameter(torch.randn(3, 8)), nn.Embedding(8, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, numbers: Tensor, kinds: Tensor) -> Tensor:
        tokens = torch.cat([numbers[..., None] * self.of_numbers, self.of_kinds(kinds + torch.tensor([0, 4]))], 1)
        return self.head(self.layer(tokens).mean(1)).squeeze(1)


def loss(model: nn.Module, batch: Sample) -> Tensor:
    """One loss a sample."""
    (numbers, kinds), target = batch
    return F.mse_loss(model(numbers, kinds), target, reduction="none")


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.tabular.FTTransformer",
        "data=custom",
        "data.train._target_=tests.programs.tabular.Table",
        "task=custom",
        "task._target_=tests.programs.tabular.loss",
        "optimizer.lr=0.01",
    ],
    lambda: by_hand(),
)


def by_hand() -> list[float]:
    model = built(FTTransformer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return plain_loop(model, Table(), lambda m, batch: loss(m, batch).mean(), optimizer=optimizer)
