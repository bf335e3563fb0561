"""Figures of a whole evaluation set from its chunks: torchmetrics' own on the whole set, whatever the chunks and ranks."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from descent.config import compose
from descent.errors import ConfigError, TrainingError
from descent.training.collectives import Group
from descent.training.evaluation_results import described, reduce_parts, states_of
from descent.training.measure import Measure
from descent.training.metric_states import MetricSet
from descent.training.results import Mean, Predictions, Rows, Sum

N, CLASSES = 40, 4
_rng = np.random.default_rng(0)
LOGITS = torch.tensor(_rng.normal(size=(N, CLASSES)), dtype=torch.float32)
LABELS = torch.tensor(_rng.integers(0, CLASSES, N))
VALUES = LOGITS[:, 0] + 0.3 * LOGITS[:, 1]
SENTENCES = [
    f"the {a} sat on the {b}"
    for a, b in zip(["cat", "dog", "bird", "cat", "fish"] * 8, ["mat", "rug"] * 20, strict=True)
]
ANSWERS = [s.replace("rug", "mat") if i % 3 else s.replace("sat", "lay") for i, s in enumerate(SENTENCES)]
KINDS: dict[str, tuple[str, dict[str, Any], Any, Any]] = {
    "macro f1": ("classification.MulticlassF1Score", {"num_classes": CLASSES}, LOGITS, LABELS),
    "f1 per class": ("classification.MulticlassF1Score", {"num_classes": CLASSES, "average": "none"}, LOGITS, LABELS),
    "top 2": ("classification.MulticlassAccuracy", {"num_classes": CLASSES, "top_k": 2}, LOGITS, LABELS),
    "auc": ("classification.MulticlassAUROC", {"num_classes": CLASSES}, LOGITS, LABELS),
    "auc in bins": ("classification.MulticlassAUROC", {"num_classes": CLASSES, "thresholds": 20}, LOGITS, LABELS),
    "calibration": ("classification.MulticlassCalibrationError", {"num_classes": CLASSES}, LOGITS, LABELS),
    "multi-label": (
        "classification.MultilabelF1Score",
        {"num_labels": CLASSES},
        LOGITS.sigmoid(),
        (LOGITS > 0.4).long(),
    ),
    "r2": ("regression.R2Score", {}, LOGITS[:, 0], VALUES),
    "spearman": ("regression.SpearmanCorrCoef", {}, LOGITS[:, 0], VALUES),
    "pearson": ("regression.PearsonCorrCoef", {}, LOGITS[:, 0], VALUES),
    "kendall": ("regression.KendallRankCorrCoef", {}, LOGITS[:, 0], VALUES),
    "bleu": ("text.BLEUScore", {"n_gram": 2}, SENTENCES, [[a] for a in ANSWERS]),
    "word errors": ("text.WordErrorRate", {}, SENTENCES, ANSWERS),
}


class Ranks:
    """Several ranks in threads that add their tensors up."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier, self.shared = world, threading.Barrier(world), [torch.zeros(0)] * world

    def group(self, rank: int) -> Group:
        group = Group(rank, self.world, torch.device("cpu"), threading.Event())
        group.sum_ = lambda tensor: self._sum(rank, tensor)  # type: ignore[method-assign]
        return group

    def _sum(self, rank: int, tensor: Tensor) -> Tensor:
        self.shared[rank] = tensor
        self.barrier.wait(30)
        total = torch.stack(self.shared).sum(0, dtype=tensor.dtype)
        self.barrier.wait(30)
        return total


class Told:
    """A task that says what the test wants, for the rows of a chunk."""

    def __init__(self, results: Any) -> None:
        self.results, self.where = results, "task"

    def evaluate(self, model: Any, rows: slice, num_samples: int) -> Any:  # noqa: ARG002
        return self.results(rows)

    def compute(self, reduced: Any) -> dict[str, float]:
        return {k: v if isinstance(v, float) else float(v.double().sum()) for k, v in reduced.items()}


def figures(results: Any, metrics: dict[str, Any], cuts: list[int], world: int) -> list[dict[str, float]]:
    """What each rank comes to. cuts: where one chunk ends and the next begins."""
    bounds = list(zip([0, *cuts], [*cuts, N], strict=True))
    ranks, found = Ranks(world), [{}] * world

    def run(rank: int) -> None:
        measure = Measure(Told(results), MetricSet({n: m.clone() for n, m in metrics.items()}))  # type: ignore[arg-type]
        states = described(measure.part(None, slice(0, 3), 3))  # type: ignore[arg-type]
        chunks = range(rank, len(bounds), world)
        parts = ((c, measure.part(None, slice(*bounds[c]), 0)) for c in chunks)  # type: ignore[arg-type]
        found[rank] = measure.figures(reduce_parts(parts, states, len(bounds), ranks.group(rank), "task"), states)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def loss() -> Mean:
    return Mean(1.0, 1)


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(KINDS)), cuts=st.sets(st.integers(1, N - 1), max_size=6), world=st.integers(1, 3))
def test_a_metric_is_that_of_the_whole_set(name: str, cuts: set[int], world: int) -> None:
    path, arguments, preds, target = KINDS[name]
    package, cls = path.split(".")
    make = getattr(getattr(torchmetrics, package), cls)
    whole = make(**arguments)
    whole.update(preds, target)
    expected = whole.compute()
    results = lambda rows: {"loss": loss(), "p": Predictions(preds[rows], target[rows])}  # noqa: E731
    found = figures(results, {"m": make(**arguments)}, sorted(cuts), world)
    values = {k: v for k, v in found[0].items() if k.startswith("m")}
    assert list(values.values()) == pytest.approx(expected.reshape(-1).tolist(), rel=1e-5, abs=1e-6)
    assert all(other == found[0] for other in found)
    assert figures(results, {"m": make(**arguments)}, sorted(cuts), 1)[0] == found[0]


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, N - 1), max_size=9), world=st.integers(1, 4))
def test_means_sums_and_rows_are_those_of_the_whole_set(cuts: set[int], world: int) -> None:
    seen: list[Tensor] = []

    class Keeps(Told):
        def compute(self, reduced: Any) -> dict[str, float]:
            seen.append(reduced["rows"])
            return {"loss": reduced["loss"], "sum": float(reduced["sum"][2])}

    def results(rows: slice) -> dict[str, Any]:
        return {
            "loss": Mean(LOGITS[rows, 0].sum(), len(LABELS[rows])),
            "sum": Sum(torch.bincount(LABELS[rows], minlength=CLASSES)),
            "rows": Rows(LABELS[rows]),
        }

    bounds = list(zip([0, *sorted(cuts)], [*sorted(cuts), N], strict=True))
    ranks, found = Ranks(world), [{}] * world

    def run(rank: int) -> None:
        measure = Measure(Keeps(results), MetricSet({}))  # type: ignore[arg-type]
        states = described(states_of(results(slice(0, 2))))
        parts = ((c, states_of(results(slice(*bounds[c])))) for c in range(rank, len(bounds), world))
        found[rank] = measure.figures(reduce_parts(parts, states, len(bounds), ranks.group(rank), "t"), states)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(rows, LABELS) for rows in seen) and len(seen) == world
    assert found[0]["loss"] == pytest.approx(float(LOGITS[:, 0].double().mean()), rel=1e-6)
    assert found[0]["sum"] == float((LABELS == 2).sum())
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize(
    ("later", "words"),
    [
        ({"loss": Mean(1.0, 1)}, "gives loss, and gave loss, table for the first batch"),
        (
            {"loss": Mean(1.0, 1), "table": Sum(torch.zeros(3))},
            "'table' as a sum of the shape [3], and gave a sum of the shape [2]",
        ),
        ({"loss": Mean(1.0, 1), "table": Rows(torch.zeros(2))}, "'table' as a rows"),
        ({"loss": Mean(1.0, -1), "table": Sum(torch.zeros(2))}, "counts -1 for 'loss'"),
        ({"loss": Mean(1.0, float("nan")), "table": Sum(torch.zeros(2))}, "counts nan for 'loss'"),
    ],
)
def test_a_part_that_is_not_as_the_first_is_named(later: dict[str, Any], words: str) -> None:
    states = described(states_of({"loss": loss(), "table": Sum(torch.zeros(2))}))
    parts = iter([(0, states_of(later))])
    with pytest.raises(TrainingError) as caught:
        reduce_parts(parts, states, 1, Group(0, 1, torch.device("cpu"), threading.Event()), "task=t")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["metrics.f1._target_=torchmetrics.classification.MulticlassF1"],
            "did you mean torchmetrics.classification.MulticlassF1Score",
        ),
        (["metrics.f1._target_=torch.nn.Linear"], "metrics needs 'metric'"),
        (
            ["metrics.b._target_=torchmetrics.text.BERTScore"],
            "metrics.b._target_=torchmetrics.text.BERTScore: is not a public class",
        ),
        (["metrics.r._target_=torchmetrics.regression.R2Score"], "metrics.r: can't compare these predictions"),
        (["checkpoint.keep_best=eval/f2"], "eval/f2"),
        (["metrics.accuracy._target_=torchmetrics.classification.MulticlassAccuracy"], "a figure 'accuracy' too"),
    ],
)
def test_what_can_not_be_measured_is_refused_before_the_run(overrides: list[str], words: str) -> None:
    from descent.training.plan import prepare

    with pytest.raises(ConfigError) as caught:
        prepare(compose(["experiment=digits", *overrides]).config, cores=2.0, gpus=0.0)
    assert words in str(caught.value)


def test_the_datas_classes_fill_a_metric_in() -> None:
    config = compose(["metrics.f1._target_=torchmetrics.classification.MulticlassF1Score"]).config
    assert MetricSet.of(config, 10).metrics["f1"].num_classes == 10
