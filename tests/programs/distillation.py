"""A student learns from a frozen teacher, which the task holds."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.programs.pictures import Pictures
from tests.programs.program import Program, built, plain_loop


class Student(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 10))


def teacher() -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network


class Distillation:
    def __init__(self, temperature: float = 2.0) -> None:
        self.teacher, self.temperature = teacher(), temperature

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        with torch.no_grad():
            wanted = (self.teacher(images) / self.temperature).softmax(1)
        logits = model(images)
        soft = F.kl_div((logits / self.temperature).log_softmax(1), wanted, reduction="batchmean")
        return F.cross_entropy(logits, labels) + self.temperature**2 * soft


def by_hand() -> list[float]:
    task = Distillation()
    task.teacher.eval()
    return plain_loop(built(Student), Pictures(), task.loss)


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.distillation.Student",
        "data=custom",
        "data.train._target_=tests.programs.pictures.Pictures",
        "task=custom",
        "task._target_=tests.programs.distillation.Distillation",
    ],
    by_hand,
)
