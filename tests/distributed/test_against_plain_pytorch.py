"""The engine against a loop as anyone would write it: whole batch, mean loss, torch's own optimizer."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from descent.training.input.sampling import SampleOrder
from descent.training.plan import build_data, build_model
from tests.distributed.replicas import Case, Crew

STEPS = 20
BATCH = 30  # over 4 slots: 7, 8, 7, 8

Make = Callable[[nn.Module], torch.optim.Optimizer]


def by_dimension(model: nn.Module, decay: float) -> list[dict]:
    """Weight decay on matrices, none on biases."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


def cosine(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / STEPS))


def halved_every_4(step: int) -> float:
    return 0.5 ** (step // 4)


def warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 5)


CASES: dict[str, tuple[list[str], Make, Callable[[int], float]]] = {
    "sgd": (
        ["optimizer=sgd", "optimizer.lr=0.1", "optimizer.weight_decay=0.0", "schedule=constant"],
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        lambda _: 1.0,
    ),
    "momentum, cosine": (
        ["optimizer=momentum", "optimizer.lr=0.05", "optimizer.momentum=0.9", "optimizer.weight_decay=0.0"],
        lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
        cosine,
    ),
    "adamw, decay on matrices, steps": (
        [
            "optimizer=adamw",
            "optimizer.lr=0.003",
            "optimizer.weight_decay=0.1",
            "schedule=step",
            "schedule.step_size=4",
            "schedule.gamma=0.5",
        ],
        lambda m: torch.optim.AdamW(by_dimension(m, 0.1), lr=0.003),
        halved_every_4,
    ),
    "adamw, warm-up": (
        [
            "optimizer=adamw",
            "optimizer.lr=0.003",
            "optimizer.weight_decay=0.0",
            "schedule=constant",
            "schedule.warmup_steps=5",
        ],
        lambda m: torch.optim.AdamW(m.parameters(), lr=0.003, weight_decay=0.0),
        warm_up,
    ),
}


def plain_loop(
    case: Case,
    make: Make,
    multiplier: Callable[[int], float],
    clip_norm: float | None,
    clip_value: float | None,
    ema_decay: float | None,
) -> tuple[list[float], float]:
    """(loss of each step, loss on the held-out set at the end)."""
    train, held_out = build_data(case.config)
    assert held_out is not None
    model = build_model(case.config, train)
    optimizer = make(model)
    base = [g["lr"] for g in optimizer.param_groups]
    order = SampleOrder(len(train), BATCH, case.config.seed)
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = []
    for step in range(STEPS):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * multiplier(step)
        samples = [train[int(i)] for i in order.samples_of(step + 1)]
        inputs, targets = (torch.stack(part) for part in zip(*samples, strict=True))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        if clip_value is not None:
            nn.utils.clip_grad_value_(model.parameters(), clip_value)
        optimizer.step()
        losses.append(loss.item())
        if ema_decay is not None:
            d = min(ema_decay, (1 + step) / (10 + step))
            for name, p in model.named_parameters():
                average[name] = d * average[name] + (1 - d) * p.detach()
    if ema_decay is not None:
        model.load_state_dict(average)
    model.eval()
    inputs, targets = (torch.stack(part) for part in zip(*held_out, strict=True))
    with torch.no_grad():
        return losses, nn.functional.cross_entropy(model(inputs), targets).item()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("extra", [{}, {"clip.norm": 0.3, "ema.decay": 0.95}, {"clip.value": 0.002}], ids=str)
def test_losses_are_those_of_a_plain_loop(pool: Crew, tmp_path: Path, name: str, extra: dict[str, float]) -> None:
    overrides, make, multiplier = CASES[name]
    overrides = [
        *overrides,
        f"batch.size={BATCH}",
        "batch.micro_size=3",
        f"steps={STEPS}",
        "epochs=null",
        "evaluate.batch_size=50",
        *(f"{k}={v}" for k, v in extra.items()),
    ]
    clip_norm, clip_value = extra.get("clip.norm"), extra.get("clip.value")
    cases = [Case.of([*overrides, f"reduction={kind}"], tmp_path) for kind in ("exact", "fast")]
    losses, held_out = plain_loop(cases[0], make, multiplier, clip_norm, clip_value, extra.get("ema.decay"))
    for case in cases:
        for world in (1, 3):
            reports = pool.train(case, world)[0]
            assert reports.losses == pytest.approx(losses, abs=1e-5, rel=1e-5), (
                case.config.reduction,
                world,
            )
            evaluated = reports.metrics[-1][1]["eval/loss"]
            assert evaluated == pytest.approx(held_out, abs=1e-5, rel=1e-5), (
                case.config.reduction,
                world,
            )
