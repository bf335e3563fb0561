"""Models, optimizers, schedules and losses as people bring them, for tests of training."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Backboned(nn.Module):
    """A backbone under a head, for the images of digits."""

    def __init__(self, backbone_frozen: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh())
        self.head = nn.Linear(16, 10)
        if backbone_frozen:
            self.backbone.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.backbone(x))
        return found


class ReleasesAtOnce(Backboned):
    """Lets its frozen backbone train in its first forward."""

    def __init__(self) -> None:
        super().__init__(backbone_frozen=True)

    def forward(self, x: Tensor) -> Tensor:
        self.backbone.requires_grad_(True)
        return super().forward(x)


class ReleasesLater(Backboned):
    """Lets its frozen backbone train once the head's bias has grown."""

    def __init__(self) -> None:
        super().__init__(backbone_frozen=True)

    def forward(self, x: Tensor) -> Tensor:
        if float(self.head.bias.detach().abs().max()) > 0.3:
            self.backbone.requires_grad_(True)
        return super().forward(x)


class SquaredError:
    """A loss as a class whose objects are called."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return self.scale * ((output.squeeze(-1) - target) ** 2).mean()


def squared_error_of(scale: float) -> SquaredError:
    """Makes a loss, and is none."""
    return SquaredError(scale)


def halving(step: int) -> float:
    return 0.5**step


def halving_every(steps: int) -> Callable[[int], float]:
    """Makes a schedule, and is none."""
    return lambda step: 0.5 ** (step // steps)


class Forgetful:
    """A schedule that counts its calls instead of the steps."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:  # noqa: ARG002
        self.calls += 1
        return 1.0 / self.calls


def never(step: int) -> str:  # noqa: ARG001
    return "never"


class Recurrent(nn.Module):
    """Reads a digit row by row. What it keeps from batch to batch is up to the classes below."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 12, batch_first=True)
        self.head = nn.Linear(12, 10)
        self.hidden: Tensor | None = None

    def read(self, x: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        found, hidden = self.rnn(x.reshape(len(x), 8, 8), hidden)
        return self.head(found[:, -1]), hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x, None)[0]


class OnlyLooksAtHidden(Recurrent):
    """Keeps the last state for whoever wants to look at it."""

    def forward(self, x: Tensor) -> Tensor:
        output, self.hidden = self.read(x, None)
        return output


class CarriesAttribute(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        output, hidden = self.read(x, self.hidden)
        self.hidden = hidden.detach()
        return output


class CarriesList(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.memory: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        output, hidden = self.read(x, self.memory[-1] if self.memory else None)
        self.memory.append(hidden)
        return output


class CarriesBuffer(Recurrent):
    """For micro-batches of one size only."""

    carried: Tensor

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.register_buffer("carried", torch.zeros(1, size, 12))

    def forward(self, x: Tensor) -> Tensor:
        output, hidden = self.read(x, self.carried.clone())
        self.carried.copy_(hidden.detach())
        return output


class CarriesGrowingBuffer(CarriesBuffer):
    """A buffer that takes the size of the batch."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        start = self.carried if self.carried.shape[1] == len(x) else torch.zeros(1, len(x), 12)
        output, hidden = self.read(x, start)
        self.carried = hidden.detach()
        return output


class CarriesLateBuffer(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        output, hidden = self.read(x, getattr(self, "carried", None))
        self.register_buffer("carried", hidden.detach())
        return output


class TakesHidden(Recurrent):
    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:  # type: ignore[override]
        return self.read(x, hidden)[0]


class CarryingTask:
    """Carries the hidden state itself."""

    hidden: Tensor | None = None

    def loss(self, model: Recurrent, batch: tuple[Tensor, Tensor]) -> Tensor:
        output, hidden = model.read(batch[0], self.hidden)
        self.hidden = hidden.detach()
        return nn.functional.cross_entropy(output, batch[1])


class Checkpointed(Backboned):
    """Computes its backbone again in the backward; the dropout in there draws the same numbers again."""

    def __init__(self, again: bool = True, use_reentrant: bool = False) -> None:
        super().__init__()
        self.backbone.append(nn.Dropout(0.3))
        self.again, self.use_reentrant = again, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if not self.again:
            return super().forward(x)
        found = checkpoint(self.backbone, x.requires_grad_(self.use_reentrant), use_reentrant=self.use_reentrant)
        output: Tensor = self.head(found)
        return output
