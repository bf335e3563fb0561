"""Parameters that are channels_last, transposed or slices train as in plain PyTorch, through every reduction."""

from pathlib import Path

import pytest
import torch
from torch import nn

from descent.training.input.sampling import SampleOrder
from descent.training.plan import build_data, build_model
from tests.distributed.replicas import Case, Crew
from tests.hard_to_repeat import OtherLayouts, overrides

STEPS, BATCH = 8, 24
RUN = [
    *overrides(OtherLayouts),
    "optimizer=adamw",
    "optimizer.lr=0.01",
    "optimizer.weight_decay=0.0",
    "schedule=constant",
    f"batch.size={BATCH}",
    f"steps={STEPS}",
    "epochs=null",
    "loss.label_smoothing=0.0",
    "ema.decay=0.9",
    "evaluate.every=end",
]


def plain_losses(case: Case) -> list[float]:
    """A loop as anyone would write it, on row-major parameters."""
    train, _ = build_data(case.config)
    model = build_model(case.config, train)
    for p in model.parameters():
        p.data = p.data.clone(memory_format=torch.contiguous_format)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0, foreach=False)
    order, losses = SampleOrder(len(train), BATCH, case.config.seed), []
    for step in range(STEPS):
        inputs, targets = train.gather(order.samples_of(step + 1))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_losses_are_those_of_a_plain_loop(pool: Crew, tmp_path: Path, reduction: str) -> None:
    case = Case.of([*RUN, f"reduction={reduction}"], tmp_path)
    wanted = plain_losses(case)
    hashes = set()
    for world in (1, 2, 3):
        reports = pool.train(case, world)[0]
        assert reports.losses == pytest.approx(wanted, abs=1e-4, rel=1e-4), world
        hashes.add(reports.sha256)
    assert len(hashes) == 1 or reduction == "fast"


@pytest.mark.parametrize(("compress", "tolerance"), [("bf16", 0.02), ("powersgd", 0.2)])
def test_compressed_gradients_stay_close_to_a_plain_loop(
    pool: Crew, tmp_path: Path, compress: str, tolerance: float
) -> None:
    case = Case.of([*RUN, "reduction=fast", f"compress={compress}"], tmp_path)
    wanted = plain_losses(case)
    for world in (2, 3):
        reports = pool.train(case, world)
        assert len({t.sha256 for t in reports}) == 1
        assert reports[0].losses == pytest.approx(wanted, rel=tolerance), world
