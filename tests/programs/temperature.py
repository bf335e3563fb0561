"""A task with a parameter of its own: the temperature of a classifier's cosines."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.programs.pictures import Pictures
from tests.programs.program import Program, built, plain_loop

Pair = tuple[Tensor, Tensor]


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 10))


class Scaled:
    def __init__(self) -> None:
        self.log_scale = nn.Parameter(torch.zeros(()))

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        return F.cross_entropy(F.normalize(model(batch[0])) * self.log_scale.exp(), batch[1])


def by_hand() -> list[float]:
    model, task = built(Net), Scaled()
    optimizer = torch.optim.SGD(
        [{"params": model.parameters()}, {"params": [task.log_scale], "lr": 0.5}], lr=0.05, momentum=0.9
    )
    return plain_loop(model, Pictures(), task.loss, optimizer=optimizer)


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.temperature.Net",
        "data=custom",
        "data.train._target_=tests.programs.pictures.Pictures",
        "task=custom",
        "task._target_=tests.programs.temperature.Scaled",
        "+optimizer.momentum=0.9",
        "optimizer.groups=[{match: loss.log_scale, lr_scale: 10}]",
    ],
    by_hand,
)
