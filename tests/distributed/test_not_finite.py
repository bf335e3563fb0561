"""Losses and gradients that are not finite: repeated, else skipped by all, and named."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from descent.messages import Notice
from descent.training.input.sampling import SampleOrder, slot_bounds
from descent.training.plan import build_data
from descent.training.slot_balancer import assign_slots
from tests.distributed.replicas import Case, Crew, Report

BATCH, SLOTS, STEP = 30, 4, 7
RUN = [
    f"batch.size={BATCH}",
    "model.depth=2",
    "model.norm=batch",
    "model.dropout=0.2",
    "evaluate.every=5",
    "ema.decay=0.9",
    "steps=12",
    "epochs=null",
    "reduction=exact",
    "schedule=plateau",
    "straggler.balance=false",
]


@dataclass(frozen=True)
class OnceNotFinite:
    """Memory that fails once: the loss, or a layer's gradient, of this replica's first try of STEP."""

    where: str

    def __call__(self, trainer: Any) -> None:
        failed = []

        def now() -> bool:
            strikes = trainer.control.step == STEP - 1 and trainer.state.model.training and not failed
            if strikes:
                failed.append(True)
            return strikes

        if self.where == "loss":
            trainer.state.model.register_forward_hook(lambda _, __, output: output * float("nan") if now() else output)
        else:
            layer = trainer.state.model.get_submodule("layers.1.linear")
            layer.weight.register_hook(lambda g: g * float("inf") if now() else g)


@dataclass(frozen=True)
class SpoilSample:
    """One sample of the training data holds a NaN."""

    number: int

    def __call__(self, trainer: Any) -> None:
        inputs = trainer.feed._data.inputs
        assert inputs.is_floating_point()
        inputs[self.number].view(-1)[5] = float("nan")


@dataclass(frozen=True)
class SpoilLayer:
    """From STEP on the gradient of one layer overflows, whatever the sample."""

    def __call__(self, trainer: Any) -> None:
        layer = trainer.state.model.get_submodule("layers.1.linear")
        layer.weight.register_hook(lambda g: g * float("inf") if trainer.control.step >= STEP - 1 else g)


@dataclass(frozen=True)
class DieInTry:
    """SIGKILL as the first or the second try of STEP enters `phase`."""

    number: int
    phase: str

    def __call__(self, trainer: Any) -> None:
        enter, tries = trainer.control.enter, []

        def entering(phase: str) -> None:
            enter(phase)
            if phase == self.phase and trainer.control.step == STEP - 1:
                tries.append(True)
                if len(tries) == self.number:
                    os.kill(os.getpid(), signal.SIGKILL)

        trainer.control.enter = entering


def run(pool: Crew, case: Case, world: int, tamper: dict[int, Callable[[Any], None]]) -> list[Report]:
    replicas = pool.build(case, world, tamper=tamper)
    pool.form(case, replicas)
    reports = [replica.next_report() for replica in replicas]
    pool.give(replicas)
    return reports


def the_notice(reports: list[Report], kind: str) -> Notice:
    """All ranks tell one and the same."""
    notices = {str([n for n in t.notices if n.kind == kind]) for t in reports}
    assert len(notices) == 1
    (notice,) = [n for n in reports[0].notices if n.kind == kind]
    return notice


@pytest.mark.parametrize(
    ("where", "world", "victim"),
    [("loss", 1, 0), ("loss", 2, 1), ("loss", 3, 0), ("gradient", 1, 0), ("gradient", 3, 1), ("gradient", 4, 2)],
)
def test_what_was_not_finite_once_is_repeated_and_nothing_tells(
    pool: Crew, tmp_path: Path, where: str, world: int, victim: int
) -> None:
    case = Case.of(RUN, tmp_path)
    undisturbed = pool.train(case, 1)[0]
    reports = run(pool, case, world, {victim: OnceNotFinite(where)})
    for one in reports:
        assert (one.state, one.sha256) == ("finished", undisturbed.sha256), one.error
        assert one.metrics == undisturbed.metrics
    notice = the_notice(reports, "step repeated")
    assert (notice.step, notice.rank) == (STEP, victim)
    assert where in notice.detail and f"rank {victim}" in notice.detail


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("phase", ["forward", "reduce", "update"])
def test_a_rank_that_dies_in_either_try_costs_no_step(pool: Crew, tmp_path: Path, number: int, phase: str) -> None:
    case = Case.of(RUN, tmp_path)
    undisturbed = pool.train(case, 1)[0]
    replicas = pool.build(case, 3, tamper={0: OnceNotFinite("gradient"), 1: DieInTry(number, phase)})
    pool.form(case, replicas)
    ended = pool.until_ended(replicas)
    assert {i: t.state for i, t in ended.items()} == {0: "broken", 2: "broken"}
    order = sorted(ended, key=lambda i: -ended[i].step)
    behind = tuple(r for r, i in enumerate(order) if ended[i].step < ended[order[0]].step)
    pool.form(case, [replicas[i] for i in order], behind)
    for reports in (replicas[i].next_report() for i in order):
        assert (reports.state, reports.sha256) == ("finished", undisturbed.sha256), reports.error
    pool.give(replicas)


@pytest.mark.parametrize("world", [1, 2])
def test_the_fast_reduction_repeats_too(pool: Crew, tmp_path: Path, world: int) -> None:
    case = Case.of([*RUN, "reduction=fast"], tmp_path)
    undisturbed = pool.train(case, world)[0]
    reports = run(pool, case, world, {0: OnceNotFinite("gradient")})
    assert {t.sha256 for t in reports} == {undisturbed.sha256}
    # DDP has summed in place: nobody can tell whose part it was, unless there is only one
    assert the_notice(reports, "step repeated").rank == (0 if world == 1 else None)


@cache
def sample_at(position: int) -> int:
    """The sample at a place in STEP's batch."""
    train, _ = build_data(Case.of(RUN, Path()).config)
    return int(SampleOrder(len(train), BATCH, 0).samples_of(STEP)[position])


@pytest.mark.parametrize("reduction", ["exact", "fast"])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_step_with_a_bad_sample_is_skipped_by_all_and_the_sample_is_named(
    pool: Crew, tmp_path: Path, reduction: str, batch_norm: bool
) -> None:
    position = 20
    number = sample_at(position)
    norm = "batch" if batch_norm else "null"
    case = Case.of([*RUN, f"reduction={reduction}", f"model.norm={norm}"], tmp_path)
    slot = next(s for s, (lo, hi) in enumerate(slot_bounds(BATCH, SLOTS)) if lo <= position < hi)
    hashes = set()
    for world in (1, 3):
        reports = run(pool, case, world, {r: SpoilSample(number) for r in range(world)})
        assert [t.state for t in reports] == ["finished"] * world, reports[0].error
        assert len({t.sha256 for t in reports}) == 1
        hashes.add(reports[0].sha256)
        skipped = [step for step, m in reports[0].metrics if m.get("train/skipped")]
        assert skipped == [STEP]
        notice = the_notice(reports, "step skipped")
        rank = next(r for r, (lo, hi) in enumerate(assign_slots(SLOTS, world)) if lo <= slot < hi)
        (finding,) = notice.extra["slots"]
        assert (notice.step, notice.rank, finding["rank"], finding["slot"]) == (
            STEP,
            rank,
            rank,
            slot,
        )
        assert finding["samples"] == [number] and finding["inputs"] and finding["loss"] == "nan"
        assert finding["layers"][0] == "layers.0.linear"
        assert f"rank {rank}, slot {slot}" in notice.detail and f"samples {number} " in notice.detail
    if reduction == "exact":
        assert len(hashes) == 1


def test_a_gradient_that_is_never_finite_ends_the_run_and_names_the_layer(pool: Crew, tmp_path: Path) -> None:
    case = Case.of([*RUN, "model.norm=null", "regroup.max_bad_steps=3"], tmp_path)
    reports = run(pool, case, 2, {0: SpoilLayer(), 1: SpoilLayer()})
    for one in reports:
        assert one.state == "failed" and one.error.startswith("TooManyBadSteps")
        for words in (
            f"step {STEP + 2}",
            "rank 0, slot 0",
            "layers.1.linear",
            "all 7 samples",
            "optimizer.lr",
            "clip.norm=1.0",
        ):
            assert words in one.error
        assert [n.step for n in one.notices if n.kind == "step skipped"] == [
            STEP,
            STEP + 1,
            STEP + 2,
        ]
    slots = reports[0].notices[0].extra["slots"]
    assert [(f["rank"], f["slot"]) for f in slots] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert all(f["layers"] == ["layers.1.linear"] and f["loss"] != "nan" for f in slots)


def test_a_generation_that_is_only_to_save_takes_no_step(pool: Crew, tmp_path: Path) -> None:
    case = Case.of(RUN, tmp_path)
    replicas = pool.build(case, 2)
    pool.form(case, replicas[:1], pausing=0)
    paused = replicas[0].next_report()
    pool.form(case, replicas, behind=(1,), save_only=True)
    for reports in (replica.next_report() for replica in replicas):
        assert (reports.state, reports.step, reports.sha256) == ("paused", paused.step, paused.sha256)
        assert {p.step for p in reports.shares} == {paused.step}
    pool.give(replicas)
