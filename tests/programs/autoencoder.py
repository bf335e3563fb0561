"""A variational autoencoder: the model gives three tensors, the target is the input, the loss is a sum over pixels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descent import Mean
from tests.programs.pictures import Pictures
from tests.programs.program import Program, built, plain_loop


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mu, self.logvar = nn.Linear(64, 32), nn.Linear(32, 4), nn.Linear(32, 4)
        self.decode = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encode(x.flatten(1)).relu()
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        return self.decode(z), mu, logvar


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Mean]:
    """Binary cross-entropy over the pixels and the distance to the prior, per sample."""
    x = batch[0].flatten(1)
    logits, mu, logvar = model(x)
    rebuilt = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum()
    n = len(x)
    return {"loss": Mean(rebuilt + kl, n), "rebuilt": Mean(rebuilt, n), "kl": Mean(kl, n)}


def by_hand() -> list[float]:
    def mean(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0].flatten(1)
        logits, mu, logvar = model(x)
        rebuilt = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return (rebuilt - 0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum()) / len(x)

    model = built(VAE)
    return plain_loop(model, Pictures(), mean, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.autoencoder.VAE",
        "data=custom",
        "data.train._target_=tests.programs.pictures.Pictures",
        "task=custom",
        "task._target_=tests.programs.autoencoder.loss",
        "optimizer.lr=0.01",
    ],
    by_hand,
    slots=(1,),  # each slot draws its own noise
)
