"""A GAN: two networks, two losses, two optimizers that take turns on one batch."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descent import Mean

NOISE = 8


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(NOISE, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))


class Adversarial:
    """Each phase is a method; its name says which module it trains."""

    phases: ClassVar = {"discriminator": "discriminator", "generator": "generator"}

    def discriminator(self, model: GAN, batch: tuple[Tensor, Tensor]) -> dict[str, Mean]:
        real = batch[0].flatten(1)
        n = len(real)
        fake = model.generator(torch.randn(n, NOISE)).detach()
        on_real, on_fake = model.discriminator(real), model.discriminator(fake)
        loss = F.softplus(-on_real).sum() + F.softplus(on_fake).sum()
        return {"loss": Mean(loss, n), "real": Mean(on_real.sigmoid().sum(), n)}

    def generator(self, model: GAN, batch: tuple[Tensor, Tensor]) -> Tensor:
        fake = model.generator(torch.randn(len(batch[0]), NOISE))
        return F.softplus(-model.discriminator(fake)).mean()
