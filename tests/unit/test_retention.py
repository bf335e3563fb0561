"""What is kept, and that a deletion which stops anywhere harms nothing."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from descent.checkpoint.cadence import Cadence, interval, young
from descent.checkpoint.manifest import commit_checkpoint
from descent.checkpoint.reader import list_checkpoints, newest_checkpoint
from descent.checkpoint.retention import Retention, delete, prune, to_keep
from descent.checkpoint.writer import ShareWriter
from descent.messages import ShareWritten

SCORES = st.dictionaries(st.integers(0, 500), st.none() | st.floats(allow_nan=True, width=16), min_size=1)


@given(SCORES, st.integers(1, 4), st.none() | st.integers(1, 200), st.sampled_from(["min", "max"]))
def test_the_rule_keeps_what_it_says(scores: dict[int, float | None], last: int, every: int | None, mode: str) -> None:
    rule = Retention(last, every, "eval/loss", mode)  # type: ignore[arg-type]
    kept = to_keep(scores, rule)
    assert set(sorted(scores)[-last:]) <= kept <= set(scores)
    known = [s for s in scores.values() if s is not None and s == s]
    if known:
        assert (max if mode == "max" else min)(known) in {scores[s] for s in kept}
    if every is not None:
        assert {s // every for s in kept} >= {s // every for s in scores} - {0}
    # Deleting the rest and asking again changes nothing: a rule must not eat its own results.
    assert to_keep({s: scores[s] for s in kept}, rule) == kept


def make_checkpoint(root: Path, step: int, score: float | None = None) -> None:
    shares: list[ShareWritten] = []
    writer = ShareWriter(root, shares.append)
    tensors = {"model/x": torch.full((4,), float(step)), "optimizer/x/y": torch.ones(2)}
    scalars = {} if score is None else {"eval/loss": score}
    writer.write(tensors, step=step, rank=0, world_size=1, generation=1, scalars=scalars)
    writer.wait_until_written()
    commit_checkpoint(root, shares, run="r", config_sha256="c")


def steps(root: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in root.iterdir())


def test_the_best_the_rare_and_the_newest_stay(tmp_path: Path) -> None:
    for step, score in ((10, 0.5), (20, 0.1), (30, 0.4), (40, None), (50, 0.2)):
        make_checkpoint(tmp_path, step, score)
    pruned = prune(tmp_path, Retention(1, 30, "eval/loss"))
    assert steps(tmp_path) == [20, 30, 50] and pruned == (["step-00000010", "step-00000040"], [])


@pytest.mark.parametrize("done", range(4))
def test_a_deletion_that_stops_in_the_middle_harms_nothing(tmp_path: Path, done: int) -> None:
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    folder = tmp_path / "step-00000002"
    names = sorted((p.name for p in folder.iterdir()), key=lambda n: n != "manifest.json")
    assert len(names) == 3
    delete(folder, names[:done])  # as far as it came before the process died
    found, skipped = newest_checkpoint(tmp_path)
    assert found.name == "step-00000003" and skipped == []
    if done:
        assert [t.name for t in list_checkpoints(tmp_path)] == [
            "step-00000003",
            "step-00000001",
        ]
    prune(tmp_path, Retention(1))
    assert steps(tmp_path) == [3]


def test_without_a_checkpoint_nothing_is_deleted(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    assert prune(tmp_path, Retention(1)) == ([], []) and steps(tmp_path) == [1]
    shutil.rmtree(tmp_path / "step-00000001")
    assert prune(tmp_path, Retention(1)) == ([], [])


@given(st.floats(0.001, 60), st.floats(60, 1e6))
def test_youngs_interval_costs_least(cost: float, between: float) -> None:
    def lost(every: float) -> float:
        return cost / every + every / (2 * between)

    best = young(cost, between)
    assert all(lost(best) <= lost(best * factor) * (1 + 1e-9) for factor in (0.5, 0.9, 1.1, 2))


@given(st.floats(0, 10), st.floats(0, 100), st.floats(0, 1e6), st.integers(0, 100))
def test_auto_writes_more_often_with_faults_and_never_above_its_share(
    cost: float, took: float, run: float, faults: int
) -> None:
    found = interval(cost, took, run, faults, share=0.01)
    assert cost / found <= 0.01 + 1e-12 and found >= took
    assert interval(cost, took, run, faults + 1, share=0.01) <= found


def test_the_cadence_in_seconds_and_after_a_failure() -> None:
    every_minute = Cadence(60.0, 0.01, now=0.0)
    assert not every_minute.due(59) and every_minute.due(60)
    every_minute.requested(60)
    every_minute.failed()
    assert every_minute.due(90), "a checkpoint that failed is tried again soon"
    every_minute.committed(95, 0.1, 1.0)
    assert not every_minute.due(154) and every_minute.due(155)
    by_steps = Cadence(float("inf"), 0.01, now=0.0)
    assert not by_steps.due(1e9)
    by_steps.failed()
    assert by_steps.due(30)
    auto = Cadence(None, 0.01, now=0.0)
    before = auto.every_s(0)
    for _ in range(20):
        auto.committed(0, 0.001, 0.5)
    assert auto.every_s(0) < before / 10
