"""A classifier in float16 with a loss scale; its loss is so large that the first steps overflow and are skipped."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.programs.pictures import Pictures
from tests.programs.program import Program, batches, built, draw_as_in


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def large(output: Tensor, target: Tensor) -> Tensor:
    return 40 * F.cross_entropy(output, target)


def loop_by_hand(scaler: torch.amp.GradScaler) -> tuple[list[float], list[float]]:
    """The losses of the loop of torch's examples for automatic mixed precision, with clipping after the scale is taken out, and the scale after each overflow."""
    model = built(Net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, overflows = [], []
    for step, (images, labels) in enumerate(batches(Pictures()), start=1):
        draw_as_in(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = large(model(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        losses.append(loss.item())
        if scaler.get_scale() < before:
            overflows.append(scaler.get_scale())
    return losses, overflows


def by_hand() -> list[float]:
    return loop_by_hand(torch.amp.GradScaler("cpu"))[0]


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.half_precision.Net",
        "data=custom",
        "data.train._target_=tests.programs.pictures.Pictures",
        "loss=custom",
        "loss._target_=tests.programs.half_precision.large",
        "precision=fp16",
        "clip.norm=1.0",
    ],
    by_hand,
    tolerance=1e-2,
)
