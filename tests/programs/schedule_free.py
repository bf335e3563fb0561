"""A classifier trained without a schedule, by the optimizer of the package schedulefree, whose state lies in its groups too."""

import schedulefree
from torch import Tensor, nn
from torch.nn import functional as F

from tests.programs.pictures import Pictures
from tests.programs.program import Program, built, plain_loop


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def by_hand() -> list[float]:
    """As the package's README says: the optimizer is put into the mode of training before the first step."""
    model = built(Net)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.02, warmup_steps=3)
    optimizer.train()
    return plain_loop(model, Pictures(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), optimizer=optimizer)


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.schedule_free.Net",
        "data=custom",
        "data.train._target_=tests.programs.pictures.Pictures",
        "optimizer=custom",
        "optimizer._target_=schedulefree.AdamWScheduleFree",
        "optimizer.lr=0.02",
        "+optimizer.warmup_steps=3",
        "trusted_modules=[tests,schedulefree]",
    ],
    by_hand,
)
