"""Metrics of the whole set, several sets, an early end: the same for any number of workers, through faults and resumes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics

from descent.errors import ConfigError
from descent.training.input.building import build_data
from descent.training.plan import build_model
from tests.distributed.led import assert_survives
from tests.distributed.replicas import Case, Crew, fail
from tests.distributed.test_resume import resumed, saved

RUN = [
    "batch.size=24",
    "steps=12",
    "epochs=null",
    "evaluate.every=2",
    "evaluate.batch_size=50",
    "checkpoint.every=4",
    "reduction=exact",
    "metrics.f1._target_=torchmetrics.classification.MulticlassF1Score",
    "metrics.auc._target_=torchmetrics.classification.MulticlassAUROC",
    "metrics.top3._target_=torchmetrics.classification.MulticlassAccuracy",
    "metrics.top3.top_k=3",
    "metrics.top3.average=micro",
    "checkpoint.keep_best=eval/f1",
    "data.evaluations.again._target_=descent.data.digits.Digits",
]
STOP = [*RUN, "steps=40", "optimizer.lr=0.3", "stop={metric: eval/f1, patience: 2}"]


def test_metrics_are_those_of_the_whole_set_on_any_number_of_workers(pool: Crew, tmp_path: Path) -> None:
    case = Case.of(RUN, tmp_path, 3)
    assert set(case.plan.figures) == {"loss", "accuracy", "f1", "auc", "top3"}
    alone, shared = pool.train(case, 1)[0], pool.train(case, 3)
    assert {told.sha256 for told in shared} == {alone.sha256}
    assert all(told.metrics == alone.metrics for told in shared)
    first = next(metrics for step, metrics in alone.metrics if step == 0)
    train, held_out = build_data(case.config)
    assert held_out is not None
    inputs, targets = held_out.gather(np.arange(len(held_out)))
    model = build_model(case.config, train).eval()
    with torch.no_grad():
        output = model(inputs)
    f1 = torchmetrics.functional.classification.multiclass_f1_score(output, targets, 10)
    auc = torchmetrics.functional.classification.multiclass_auroc(output, targets, 10)
    assert (first["eval/f1"], first["eval/auc"]) == pytest.approx((float(f1), float(auc)), rel=1e-5)
    top3 = (output.topk(3).indices == targets[:, None]).any(1).float().mean()
    assert first["eval/top3"] == pytest.approx(float(top3))
    assert {"eval/again/f1", "eval/again/loss"} <= first.keys()


def test_a_run_ends_early_at_the_same_step_whatever_happens(pool: Crew, tmp_path: Path) -> None:
    case = Case.of(STOP, tmp_path / "run", 3)
    whole, (target,) = saved(pool, replace(case, run_dir=tmp_path / "whole"), 1, 4)
    end = whole[0].step
    scores = [m["eval/f1"] for step, m in whole[0].metrics if "eval/f1" in m and step > 0]
    assert 4 < end < 40 and max(scores[-2:]) <= max(scores[:-2])
    assert [notice.kind for notice in whole[0].notices] == ["stopped early"]
    assert "eval/f1 has made no progress in 2 evaluations" in whole[0].notices[0].detail
    assert_survives(pool, case, whole[0], 3, fail(worker=1).at(step=5, phase="reduce"))
    last = resumed(pool, case, target, 2).finish()
    assert (last.step, last.state_sha256) == (end, whole[0].sha256)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "checkpoint.keep_best=eval/f1_micro",
            "checkpoint.keep_best=eval/f1_micro: the evaluations of this run have no such figure",
        ),
        ("checkpoint.keep_best=f1", "eval/loss, eval/accuracy"),
        ("checkpoint.keep_best=eval/zeal", "mode: max or mode: min"),
        ("stop={metric: eval/nothing_loss, patience: 2}", "stop.metric=eval/nothing_loss: the evaluations"),
    ],
)
def test_a_figure_that_is_not_there_is_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Case.of([*RUN, override], tmp_path, 2)
    assert words in str(caught.value)


def test_plateau_goes_by_any_figure(pool: Crew, tmp_path: Path) -> None:
    by = ["schedule=plateau", "schedule.patience=0", "schedule.factor=0.5", "schedule.threshold=0.9"]
    case = Case.of([*RUN, *by, "+schedule.metric=eval/f1", "+schedule.mode=max"], tmp_path, 2)
    alone = pool.train(case, 1)[0]
    rates = [m["train/learning_rate"] for _, m in alone.metrics if "train/learning_rate" in m]
    scores = [m["eval/f1"] for step, m in alone.metrics if "eval/f1" in m and step > 0]
    best, expected, rate = -np.inf, [], rates[0]
    for score in scores:
        expected += [rate, rate]
        better = score > best + 0.9 * abs(best) if np.isfinite(best) else True
        best, rate = (score, rate) if better else (best, rate / 2)
    assert rates == pytest.approx(expected)
    assert len(set(rates)) > 1
