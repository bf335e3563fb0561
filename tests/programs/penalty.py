"""TabNet's form: the model gives (output, penalty), and the penalty is a part of the loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descent import Mean
from tests.programs.pictures import Pictures
from tests.programs.program import Program, built, plain_loop


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mask, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        mask = self.mask(x).softmax(1)
        return self.head(64 * mask * x), -(mask * (mask + 1e-6).log()).sum(1).mean()


class WithPenalty:
    def __init__(self, weight: float = 0.01) -> None:
        self.weight = weight

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Mean | Tensor]:
        output, penalty = model(batch[0])
        loss = F.cross_entropy(output, batch[1]) + self.weight * penalty
        return {"loss": loss, "penalty": penalty}

    def evaluate(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Mean]:
        output, _ = model(batch[0])
        return {"accuracy": Mean((output.argmax(1) == batch[1]).sum(), len(output))}


def by_hand() -> list[float]:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        output, penalty = model(batch[0])
        return F.cross_entropy(output, batch[1]) + 0.01 * torch.as_tensor(penalty)

    return plain_loop(built(Masked), Pictures(), loss)


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.penalty.Masked",
        "data=custom",
        "data.train._target_=tests.programs.pictures.Pictures",
        "task=custom",
        "task._target_=tests.programs.penalty.WithPenalty",
    ],
    by_hand,
)
