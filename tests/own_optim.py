"""Models, optimizers, schedules and losses as people bring them, for tests of training."""

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
