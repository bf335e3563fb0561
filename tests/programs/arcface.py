"""Face recognition's additive angular margin: the loss has the centres of the classes and a temperature, which are trained."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.programs.pictures import Pictures
from tests.programs.program import Program, built, plain_loop


class Embedder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))


class ArcFace(nn.Module):
    """Deng et al., arXiv:1801.07698."""

    def __init__(self, margin: float = 0.2) -> None:
        super().__init__()
        self.centres, self.log_scale = nn.Parameter(torch.randn(10, 8)), nn.Parameter(torch.tensor(1.5))
        self.margin = margin

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        cosines = F.linear(F.normalize(features), F.normalize(self.centres)).clamp(-0.999, 0.999)
        angles = cosines.arccos() + self.margin * F.one_hot(labels, 10)
        return F.cross_entropy(self.log_scale.exp() * angles.cos(), labels)


def trained_by_hand() -> tuple[list[float], nn.Module, nn.Module]:
    model, loss = built(Embedder), built(ArcFace)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.05)
    losses = plain_loop(model, Pictures(), lambda m, b: loss(m(b[0]), b[1]), optimizer=optimizer)
    return losses, model, loss


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.arcface.Embedder",
        "data=custom",
        "data.train._target_=tests.programs.pictures.Pictures",
        "loss=custom",
        "loss._target_=tests.programs.arcface.ArcFace",
    ],
    lambda: trained_by_hand()[0],
    slots=(1,),  # batch norm sees the samples of a slot
)
