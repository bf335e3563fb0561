"""One flipped bit in one replica: seen before the step is committed, named, and healed by the others."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from descent.checkpoint.manifest import commit_checkpoint
from tests.distributed.replicas import Case, Crew, Report

STEP = 7
RUN = [
    "batch.size=30",
    "model.norm=batch",
    "model.dropout=0.2",
    "evaluate.every=5",
    "ema.decay=0.9",
    "steps=12",
    "epochs=null",
    "reduction=exact",
    "sentinel_every=1",
    "checkpoint.every=3",
]
TENSORS = {
    "a parameter": "model/layers.0.linear.weight",
    "an optimizer's moment": "optimizer/layers.0.linear.weight/exp_avg_sq",
    "an average": "ema/layers.0.linear.bias",
    "a buffer": "model/norm.running_mean",
}


@dataclass(frozen=True)
class FlipBit:
    """One bit of the state turns over as STEP begins."""

    tensor: str
    byte: int = 5
    bit: int = 1

    def __call__(self, trainer: Any) -> None:
        enter, flipped = trainer.control.enter, []

        def entering(phase: str) -> None:
            enter(phase)
            if phase == "step" and trainer.control.step == STEP - 1 and not flipped:
                flipped.append(True)
                raw = trainer.state.tensors()[self.tensor].view(-1).view(torch.uint8)
                raw[self.byte] ^= 1 << self.bit

        trainer.control.enter = entering


def losses_of(reports: list[Report]) -> dict[int, float]:
    return {s: m["train/loss"] for t in reports for s, m in t.metrics if "train/loss" in m}


@pytest.mark.parametrize("what", TENSORS)
@pytest.mark.parametrize(("world", "victim"), [(3, 0), (4, 2)])
def test_the_majority_heals_a_replica_with_a_flipped_bit(
    pool: Crew, tmp_path: Path, what: str, world: int, victim: int
) -> None:
    case = Case.of(RUN, tmp_path)
    undisturbed = pool.train(replace(case, run_dir=tmp_path / "whole"), 1)[0]
    replicas = pool.build(case, world, tamper={victim: FlipBit(TENSORS[what])})
    pool.form(case, replicas)
    for reports in (replica.next_report() for replica in replicas):
        assert (reports.state, reports.step, reports.diverged) == ("diverged", STEP - 1, (victim,))
        (notice,) = [n for n in reports.notices if n.kind == "diverged"]
        assert (notice.step, notice.rank, notice.extra["ranks"]) == (STEP, victim, (victim,))
        assert f"rank {victim}" in notice.detail
    # as the controller does it: somebody sound is rank 0, the odd one receives
    order = [r for i, r in enumerate(replicas) if i != victim] + [replicas[victim]]
    pool.form(case, order, behind=(world - 1,))
    last = [replica.next_report() for replica in order]
    for reports in last:
        assert (reports.state, reports.sha256) == ("finished", undisturbed.sha256), reports.error
        assert reports.diverged == ()
    assert losses_of(last) == losses_of([undisturbed])
    pool.give(replicas)


@pytest.mark.parametrize("what", ["a parameter", "an optimizer's moment"])
def test_where_there_is_no_majority_none_is_trusted(pool: Crew, tmp_path: Path, what: str) -> None:
    case = Case.of(RUN, tmp_path)
    undisturbed = pool.train(replace(case, run_dir=tmp_path / "whole"), 1)[0]
    replicas = pool.build(case, 2, tamper={1: FlipBit(TENSORS[what])})
    pool.form(case, replicas)
    ended = [replica.next_report() for replica in replicas]
    for reports in ended:
        assert (reports.state, reports.step, reports.diverged) == ("diverged", STEP - 1, (0, 1))
    # what was saved before the flip is sound; a save that was still being copied when it came is refused
    shares = sorted((p for t in ended for p in t.shares if p.step == 3), key=lambda p: p.rank)
    root = tmp_path / "checkpoints"
    saved = commit_checkpoint(root, shares, run="r", config_sha256="0" * 64)
    pool.give(replicas)
    replicas = pool.build(case, 2)
    pool.form(case, replicas, (1,), restore_from=saved)
    last = [replica.next_report() for replica in replicas]
    assert {t.sha256 for t in last} == {undisturbed.sha256}
    assert losses_of([*ended, *last]) == losses_of([undisturbed])
    pool.give(replicas)


def test_off_or_not_due_it_sees_nothing(pool: Crew, tmp_path: Path) -> None:
    for every in ("null", "100"):
        case = Case.of([*RUN, f"sentinel_every={every}"], tmp_path)
        reports = pool.train(case, 3, tamper={1: FlipBit(TENSORS["an average"])})
        assert not [n for t in reports for n in t.notices if n.kind == "diverged"]
        assert len({t.sha256 for t in reports}) == 2


def test_with_the_fast_reduction_and_a_cadence_it_is_seen_at_the_next_comparison(pool: Crew, tmp_path: Path) -> None:
    case = Case.of([*RUN, "sentinel_every=5", "reduction=fast"], tmp_path)
    replicas = pool.build(case, 3, tamper={2: FlipBit(TENSORS["a parameter"])})
    pool.form(case, replicas)
    for reports in (replica.next_report() for replica in replicas):
        assert (reports.state, reports.step, reports.diverged) == ("diverged", 9, (2,))
    pool.give(replicas)
