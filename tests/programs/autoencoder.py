"""A variational autoencoder: the model gives three tensors, the target is the input, the loss is a sum over pixels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descent import Mean


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
    x = batch[0].flatten(1).sigmoid()
    logits, mu, logvar = model(x)
    rebuilt = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum()
    n = len(x)
    return {"loss": Mean(rebuilt + kl, n), "rebuilt": Mean(rebuilt, n), "kl": Mean(kl, n)}
