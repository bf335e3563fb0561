"""Trainings that people have, each in the form that its own community writes: as they are, or with a few lines.

Each is compared with a plain PyTorch loop; has the same bits on 1, 2 and 3 workers, and through a kill; and goes
on from a checkpoint to the bits of the unbroken run.
"""

import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path

import pytest

import tests.programs
from tests.distributed.led import assert_survives
from tests.distributed.replicas import Case, Crew, fail
from tests.distributed.test_resume import resumed, saved
from tests.programs import digits_classifier, mixup, multi_label
from tests.programs.program import RUN, STEPS, Program

MODULES = [importlib.import_module(f"tests.programs.{m.name}") for m in pkgutil.iter_modules(tests.programs.__path__)]
PROGRAMS: dict[str, Program] = {m.__name__.rpartition(".")[2]: m.PROGRAM for m in MODULES if hasattr(m, "PROGRAM")}
each = pytest.mark.parametrize("name", PROGRAMS)


@each
def test_the_losses_are_those_of_a_plain_loop(pool: Crew, tmp_path: Path, name: str) -> None:
    program = PROGRAMS[name]
    losses = program.by_hand()
    assert len(losses) == STEPS
    for slots in program.slots:
        case = Case.of([*RUN, *program.overrides], tmp_path / str(slots), slots)
        assert pool.train(case, 1)[0].losses == pytest.approx(losses, rel=program.tolerance), f"{slots} slots"


@each
def test_no_bit_depends_on_workers_faults_or_a_resume(pool: Crew, tmp_path: Path, name: str) -> None:
    case = Case.of([*RUN, *PROGRAMS[name].overrides], tmp_path / "run", 3)
    alone, (target,) = saved(pool, replace(case, run_dir=tmp_path / "whole"), 1, 3)
    for world in (2, 3):
        assert {told.sha256 for told in pool.train(case, world)} == {alone[0].sha256}, f"{world} workers"
    assert_survives(pool, case, alone[0], 3, fail(worker=1).at(step=4, phase="reduce"))
    assert resumed(pool, case, target, 2).finish().state_sha256 == alone[0].sha256


def test_what_a_collate_function_draws_depends_on_no_worker(pool: Crew, tmp_path: Path) -> None:
    case = Case.of([*RUN, *mixup.DRAWS], tmp_path, 3)
    alone, straight = pool.train(case, 1)[0], Case.of([*RUN, *mixup.PROGRAM.overrides], tmp_path, 3)
    assert {told.sha256 for world in (2, 3) for told in pool.train(case, world)} == {alone.sha256}
    assert pool.train(straight, 1)[0].losses[0] != alone.losses[0]
    assert_survives(pool, case, alone, 3, fail(worker=0).at(step=2, phase="forward"))


def test_an_order_of_its_own_is_the_same_for_any_world_and_after_a_resume(pool: Crew, tmp_path: Path) -> None:
    overrides = [*RUN, *digits_classifier.PROGRAM.overrides, "data.sampler=class_balanced"]
    case = Case.of(overrides, tmp_path / "run", 3)
    alone, (target,) = saved(pool, replace(case, run_dir=tmp_path / "whole"), 1, 3)
    assert {told.sha256 for told in pool.train(case, 3)} == {alone[0].sha256}
    assert resumed(pool, case, target, 2).finish().state_sha256 == alone[0].sha256


def test_labels_as_floats_are_compared_by_metrics_of_labels(pool: Crew, tmp_path: Path) -> None:
    case = Case.of([*RUN, *multi_label.MEASURED], tmp_path, 3)
    alone = pool.train(case, 1)[0]
    assert {"eval/f1", "eval/auc", "eval/loss"} <= alone.metrics[-1][1].keys()
    assert [told.metrics for told in pool.train(case, 3)] == [alone.metrics] * 3
