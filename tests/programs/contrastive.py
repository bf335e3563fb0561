"""SimCLR: two views of each image, and every other sample of the batch as a negative."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.programs.pictures import Pictures
from tests.programs.program import Program, built, plain_loop


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class SimCLR:
    """`features` for each sample, `couple` for the whole batch."""

    def __init__(self, temperature: float = 0.5) -> None:
        self.temperature = temperature

    def features(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0]
        return torch.stack([model(x), model(x.flip(-1))], 1)

    def couple(self, z: Tensor) -> Tensor:
        """z: [n, 2, width]. The NT-Xent loss of Chen et al. 2020, over the 2n views."""
        n = len(z)
        z = F.normalize(z.transpose(0, 1).flatten(0, 1), dim=1)
        similar = z @ z.T / self.temperature
        similar = similar.masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
        return F.cross_entropy(similar, (torch.arange(2 * n) + n) % (2 * n))


def by_hand() -> list[float]:
    task = SimCLR()
    return plain_loop(built(Encoder), Pictures(), lambda model, batch: task.couple(task.features(model, batch)))


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.contrastive.Encoder",
        "data=custom",
        "data.train._target_=tests.programs.pictures.Pictures",
        "task=custom",
        "task._target_=tests.programs.contrastive.SimCLR",
    ],
    by_hand,
)
