"""An optimizer with `train()` and `eval()`: what is evaluated and kept for export is what its author evaluates."""

from pathlib import Path

import pytest
import schedulefree
import torch
from torch.nn import functional as F

from descent.checkpoint.weights import read_weights
from tests.distributed.replicas import Case, Crew
from tests.distributed.test_resume import resumed, saved
from tests.programs.pictures import Pictures
from tests.programs.program import RUN, built, plain_loop
from tests.programs.schedule_free import PROGRAM, Net


@pytest.mark.parametrize("ema", [[], ["ema.decay=0.9"]], ids=["plain", "averaged"])
def test_the_held_out_loss_and_the_kept_weights_are_those_after_eval(
    pool: Crew, tmp_path: Path, ema: list[str]
) -> None:
    model = built(Net)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.02, warmup_steps=3)
    optimizer.train()
    plain_loop(model, Pictures(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), optimizer=optimizer)
    optimizer.eval()
    data = Pictures()
    with torch.no_grad():
        expected = float(F.cross_entropy(model(data.images), data.labels))

    held_out = ["data.evaluate={_target_: tests.programs.pictures.Pictures}", "evaluate.every=2"]
    own = [override for override in RUN if not override.startswith("data.holdout")]
    case = Case.of([*own, *PROGRAM.overrides, *held_out, *ema], tmp_path / "run", 2)
    whole, (middle, last) = saved(pool, case, 2, 3, 6)
    figures = [r.metrics["eval/loss"] for r in whole[0].records if "eval/loss" in r.metrics]
    weights = read_weights(last)
    if not ema:
        assert figures[-1] == pytest.approx(expected, rel=1e-5)
        for name, parameter in model.named_parameters():
            assert torch.allclose(weights[name], parameter, atol=1e-6), name
    kept = built(Net)
    kept.load_state_dict(weights)
    with torch.no_grad():
        assert float(F.cross_entropy(kept(data.images), data.labels)) == pytest.approx(figures[-1], rel=1e-6)
    assert resumed(pool, case, middle, 1).finish().state_sha256 == whole[0].sha256
    less = Case.of([*RUN, *PROGRAM.overrides, *ema], tmp_path / "never evaluated", 2)
    assert pool.train(less, 1)[0].losses == whole[0].losses


def test_the_norms_by_layer_are_the_gradients_although_the_optimizer_computes_in_their_memory(
    pool: Crew, tmp_path: Path
) -> None:
    """schedulefree divides the gradients where they lie; the first step's are those that SGD gets."""

    def norms(overrides: list[str]) -> dict[str, float]:
        told = pool.train(Case.of(overrides, tmp_path, 2), 1)[0]
        return {k: v for k, v in told.records[0].metrics.items() if k.startswith("grad/norm/")}

    model = [
        override for override in PROGRAM.overrides if not override.startswith(("optimizer", "+optimizer", "~optimizer"))
    ]
    assert norms([*RUN, *PROGRAM.overrides]) == norms([*RUN, *model])
