"""float16 with a loss scale: steps that overflow are skipped and counted on all ranks alike, and are no incident."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from descent.checkpoint.manifest import read_manifest
from descent.checkpoint.reader import files_of_rank, read_files
from tests.distributed.replicas import Case, Crew, Report
from tests.distributed.test_not_finite import RUN as NOT_FINITE
from tests.distributed.test_not_finite import STEP, OnceNotFinite
from tests.distributed.test_resume import resumed, saved
from tests.programs.half_precision import PROGRAM, loop_by_hand
from tests.programs.program import RUN


def _grow_often(trainer: Any) -> None:
    trainer.state.loss_scale.growth_every = 2


def _skipped(report: Report) -> list[float]:
    """The scale after each step that overflowed."""
    assert not report.notices
    return [r.metrics["train/loss_scale"] for r in report.records if "train/overflows" in r.metrics]


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_the_scale_and_the_skipped_steps_are_those_of_grad_scaler(pool: Crew, tmp_path: Path, reduction: str) -> None:
    scaler = torch.amp.GradScaler("cpu", growth_interval=2)
    losses, overflows = loop_by_hand(scaler)
    overrides = [*RUN, *PROGRAM.overrides, f"reduction={reduction}", "tracking.every=1"]
    (reports,) = pool.train(Case.of(overrides, tmp_path / "whole", 1), 1, tamper={0: _grow_often})
    assert reports.losses == pytest.approx(losses, rel=1e-2)
    assert _skipped(reports) == overflows
    for world in (1, 2):  # each slot computes half of a batch, so that less overflows
        reports, *others = pool.train(
            Case.of(overrides, tmp_path / str(world), 2), world, tamper=dict.fromkeys(range(world), _grow_often)
        )
        assert {other.sha256 for other in others} <= {reports.sha256}
        assert reports.losses == pytest.approx(losses, rel=1e-2)
        assert len(_skipped(reports)) >= 2


def test_the_scale_is_in_the_checkpoint_and_a_resumed_run_goes_on_with_it(pool: Crew, tmp_path: Path) -> None:
    case = Case.of([*RUN, *PROGRAM.overrides], tmp_path / "run", 1)
    whole, (target, last) = saved(pool, replace(case, run_dir=tmp_path / "whole"), 1, 3, 6)
    scaler = torch.amp.GradScaler("cpu")
    _, skipped = loop_by_hand(scaler)
    manifest = read_manifest(last)
    tensors = read_files(last, manifest, files_of_rank(manifest, 0, 1))
    scale, overflows = float(tensors["scaler/scale"]), float(tensors["scaler/overflows"])
    assert (scale, overflows) == (scaler.get_scale(), len(skipped))
    assert overflows >= 2
    assert resumed(pool, case, target, 1).finish().state_sha256 == whole[0].sha256


@pytest.mark.parametrize("world", [1, 2])
def test_memory_that_fails_once_is_no_overflow(pool: Crew, tmp_path: Path, world: int) -> None:
    """A gradient that is not finite in one try and finite in the next costs no step: the bits are the undisturbed run's."""
    case = Case.of([*NOT_FINITE, "precision=fp16"], tmp_path)
    undisturbed = pool.train(case, 1)[0]
    struck = pool.train(case, world, tamper={0: OnceNotFinite("gradient")})[0]
    assert struck.sha256 == undisturbed.sha256
    assert [notice.step for notice in struck.notices] == [STEP]
    assert not undisturbed.notices
