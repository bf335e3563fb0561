"""A gradient that nobody computed is None, as in torch, and not zero: for any reduction and number of workers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from descent.checkpoint.reader import read_checkpoint
from descent.training.input.sampling import SampleOrder
from descent.training.plan import build_data, build_model
from tests.distributed.led import LedRun
from tests.distributed.replicas import Case, Crew
from tests.hard_to_repeat import Plain, overrides

STEPS, BATCH = 12, 24
RUN = [
    "optimizer=adamw",
    "optimizer.lr=0.01",
    "optimizer.weight_decay=0.1",
    "optimizer.decay_norm_and_bias=true",
    "schedule=constant",
    f"batch.size={BATCH}",
    "batch.micro_size=3",
    f"steps={STEPS}",
    "epochs=null",
    "evaluate.every=end",
    "straggler.balance=false",
]


class NeverCalled(Plain):
    """A layer that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(40, 30)


class Routed(Plain):
    """Experts: each sample goes to one of six, the last ones seldom."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 10) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        kind = (x.sum((1, 2, 3)) * 16).long() % 31
        out = super().forward(x)
        for number, expert in enumerate(self.experts):
            mine = (kind >= 5 * number) & (kind < 5 * number + 5 - number)
            # at the preflight's look, on two samples, every expert is used
            if len(x) == 2 or mine.any():
                out = out + torch.where(mine[:, None], expert(x.flatten(1)), 0.0)
        return out


def plain_loop(case: Case) -> tuple[list[float], dict[str, Tensor], set[int]]:
    """(losses, final weights, in how many steps each expert was used) of a loop as anyone would write it."""
    train, _ = build_data(case.config)
    model = build_model(case.config, train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, foreach=False)
    order, losses, used = SampleOrder(len(train), BATCH, case.config.seed), [], set()
    for step in range(STEPS):
        inputs, targets = train.gather(order.samples_of(step + 1))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        used.add(sum(p.grad is not None for p in model.parameters()))
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in model.named_parameters()}, used


def trained(pool: Crew, case: Case, world: int) -> tuple[list[float], dict[str, Tensor], str, int]:
    """(losses, final weights, hash, generations) of a run that goes through as many generations as it takes."""
    run = LedRun(pool, case)
    run.start(world)
    last = run.finish()
    assert last.checkpoint is not None and last.state_sha256 is not None
    tensors, _ = read_checkpoint(last.checkpoint)
    losses = [m["train/loss"] for (_, evaluated), m in sorted(run.metrics.items()) if not evaluated]
    weights = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
    return losses, weights, last.state_sha256, len(run.formed)


@pytest.mark.parametrize("reduction", ["exact", "fast"])
@pytest.mark.parametrize("model", [NeverCalled, Routed])
def test_weights_are_those_of_a_plain_loop(pool: Crew, tmp_path: Path, model: type[nn.Module], reduction: str) -> None:
    where = f"{__name__}.{model.__qualname__}"
    run = [*overrides(model)[:1], f"model._target_={where}", "trusted_modules=[tests]", *RUN, f"reduction={reduction}"]
    case = Case.of(run, tmp_path)
    wanted, weights, used = plain_loop(case)
    assert len(used) > 1 or model is NeverCalled  # some steps leave an expert out
    hashes = set()
    for world in (1, 2, 3):
        losses, found, sha256, generations = trained(pool, replace(case, run_dir=tmp_path / str(world)), world)
        # DDP finds out once that some steps leave parameters out, and loses no step by it
        surprised = model is Routed and reduction == "fast" and world > 1
        assert generations == (2 if surprised else 1)
        assert losses == pytest.approx(wanted, rel=1e-4, abs=1e-4), world
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        hashes.add(sha256)
    assert len(hashes) == 1 or reduction == "fast"


@pytest.mark.parametrize("compress", ["bf16", "powersgd"])
def test_compressed_too_a_layer_that_is_never_called_stays_as_it_is(pool: Crew, tmp_path: Path, compress: str) -> None:
    where = f"{__name__}.{NeverCalled.__qualname__}"
    run = ["model=custom", f"model._target_={where}", "trusted_modules=[tests]", *RUN, "reduction=fast"]
    case = Case.of([*run, f"compress={compress}"], tmp_path)
    first = build_model(case.config, build_data(case.config)[0])
    _, found, *_ = trained(pool, case, 2)
    assert torch.equal(found["spare.weight"], first.spare.weight)  # type: ignore[union-attr]
    assert not torch.equal(found["head.weight"], first.head.weight)  # type: ignore[union-attr]
