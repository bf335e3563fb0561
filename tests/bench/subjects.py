"""What is trained in the benchmarks: by hand in plain PyTorch, and as overrides of `descent train`.

Real digits that come with scikit-learn, held in memory on both sides; networks whose
step takes a given time on one core. The learning rate is tiny on both sides, so that
the loss stays where it is and no run drifts into denormal numbers, which are slow.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Subject:
    """A network and a global batch."""

    name: str
    batch: int
    depth: int = 0
    width: int = 0
    resnet: tuple[int, ...] = ()
    """Channels per stage; empty: a fully connected network of `depth` and `width`."""
    own: str = ""
    """The user's own training in its place, of `own_programs.py`: "pictures" or "sentences"."""

    def overrides(self) -> list[str]:
        """The same for `descent train`; evaluation only at the end, as the loops by hand have none."""
        if self.own:
            return [*self._own_overrides(), *self._common()]
        model = (
            ["model=resnet", "model.blocks=1", f"model.widths=[{','.join(map(str, self.resnet))}]"]
            if self.resnet
            else ["model=mlp", f"model.depth={self.depth}", f"model.width={self.width}"]
        )
        return [*model, "data=digits", *self._common()]

    def _own_overrides(self) -> list[str]:
        where = "tests.bench.own_programs"
        task = ["task=auto"] if self.own == "sentences" else ["task=custom", f"task._target_={where}.loss_of_pictures"]
        return [
            "model=custom",
            f"model._target_={where}.{'bert' if self.own == 'sentences' else 'network'}",
            "data=custom",
            f"data.train._target_={where}.{self.own}",
            "data.holdout=0",
            *task,
            "trusted_modules=[tests]",
        ]

    def _common(self) -> list[str]:
        return [
            "optimizer=adamw",
            f"optimizer.lr={LEARNING_RATE}",
            "schedule=constant",
            f"batch.size={self.batch}",
            "evaluate.every=end",
            "epochs=null",
            "steps=1000000",
        ]

    def build(self) -> nn.Module:
        """The network as somebody would write it: [B, 1, 8, 8] to [B, 10]."""
        torch.manual_seed(0)
        if self.own:
            from tests.bench import own_programs

            return own_programs.bert() if self.own == "sentences" else own_programs.network()
        if self.resnet:
            from descent.models.resnet import ResNet

            return ResNet((1, 8, 8), 10, blocks=1, widths=list(self.resnet))
        sizes = [64, *[self.width] * self.depth]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


SUBJECTS = {
    s.name: s
    for s in (
        Subject("1ms", batch=64, depth=2, width=128),
        Subject("10ms", batch=128, depth=3, width=512),
        Subject("100ms", batch=256, depth=3, width=1088),
        Subject("resnet", batch=64, resnet=(16, 32)),
        Subject("dict", batch=128, own="pictures"),
        Subject("hugging_face", batch=8, own="sentences"),
    )
}


def digits() -> tuple[Tensor, Tensor]:
    """Inputs [1617, 1, 8, 8] in [0, 1] and targets [1617]: as many as Descent trains on."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    count = len(pixels) - round(len(pixels) * 0.1)
    inputs = torch.from_numpy(pixels[:count] / 16.0).float().view(-1, 1, 8, 8)
    return inputs, torch.from_numpy(labels[:count]).long()
