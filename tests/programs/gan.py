"""A GAN: two networks, two losses, two optimizers that take turns on one batch."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descent import Mean
from tests.programs.pictures import Pictures
from tests.programs.program import STEPS, Program, batches, built, draw_as_in

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


def by_hand() -> list[float]:
    """The two updates of each batch, as the DCGAN of PyTorch's examples makes them."""
    model = built(GAN)
    on_real = torch.optim.SGD(model.discriminator.parameters(), lr=0.05)  # type: ignore[union-attr]
    on_fake = torch.optim.SGD(model.generator.parameters(), lr=0.1)  # type: ignore[union-attr]
    losses: list[float] = []
    for (images, _), _ in zip(batches(Pictures()), range(STEPS // 2), strict=False):
        real = images.flatten(1)
        draw_as_in(len(losses) + 1)
        fake = model.generator(torch.randn(len(real), NOISE))  # type: ignore[operator]
        on_real.zero_grad()
        scores = model.discriminator(real), model.discriminator(fake.detach())  # type: ignore[operator]
        loss = F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()
        loss.backward()
        on_real.step()
        losses.append(loss.item())
        draw_as_in(len(losses) + 1)
        on_fake.zero_grad()
        fake = model.generator(torch.randn(len(real), NOISE))  # type: ignore[operator]
        loss = F.softplus(-model.discriminator(fake)).mean()  # type: ignore[operator]
        loss.backward()
        on_fake.step()
        losses.append(loss.item())
    return losses


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.gan.GAN",
        "data=custom",
        "data.train._target_=tests.programs.pictures.Pictures",
        "task=custom",
        "task._target_=tests.programs.gan.Adversarial",
        "+optimizer.phases.generator.lr=0.1",
    ],
    by_hand,
    slots=(1,),  # each slot draws its own noise
)
