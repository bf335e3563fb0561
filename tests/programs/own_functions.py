"""A loss and a schedule of one's own, both plain functions, the loss with an argument: the focal loss of Lin et al., arXiv:1708.02002."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.programs.pictures import Pictures
from tests.programs.program import Program, built, plain_loop


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def focal(output: Tensor, target: Tensor, gamma: float) -> Tensor:
    entropy = F.cross_entropy(output, target, reduction="none")
    return ((1 - (-entropy).exp()) ** gamma * entropy).mean()


def triangle(step: int, peak: int = 3) -> float:
    return 1.0 - abs(step - peak) / (peak + 1)


def by_hand() -> list[float]:
    model = built(Net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, triangle)
    optimizer.register_step_post_hook(lambda *_: rates.step())
    return plain_loop(model, Pictures(), lambda m, b: focal(m(b[0]), b[1], gamma=2.0), optimizer=optimizer)


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.own_functions.Net",
        "data=custom",
        "data.train._target_=tests.programs.pictures.Pictures",
        "loss=custom",
        "loss._target_=tests.programs.own_functions.focal",
        "+loss.gamma=2.0",
        "schedule=custom",
        "schedule._target_=tests.programs.own_functions.triangle",
    ],
    by_hand,
)
