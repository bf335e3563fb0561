"""Models, optimizers, schedules and losses as people bring them, for tests of training."""

from collections.abc import Callable

from torch import Tensor, nn


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
