"""How a classifier does on each class: against scikit-learn and torch on the whole set."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_score, recall_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from descent.cluster.run.class_artifacts import write_class_report
from descent.config import compose
from descent.data.map_style import adapt
from descent.training.class_report import ClassReport, class_report
from descent.training.input.feed import Feed
from descent.training.objective import Objective
from descent.training.plan import prepare
from descent.training.task import Supervised

CPU = torch.device("cpu")


class Samples(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Random inputs [n, 4, …] and labels, of which class 4 never occurs."""

    def __init__(self, count: int, *length: int) -> None:
        random = torch.Generator().manual_seed(3)
        self.x = torch.randn(count, 4, *length, generator=random)
        self.y = torch.randint(0, 4, (count, *length), generator=random)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def report_of(samples: Samples, loss: nn.Module, size: int = 7, enough: Any = lambda: False) -> ClassReport | None:
    torch.manual_seed(0)
    model = net(samples)
    feed = Feed(adapt(samples), None, CPU)
    task = Supervised(Objective.of(loss))
    return class_report(model, task, feed, len(samples), size=size, enough=enough)


def net(samples: Samples) -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv1d(4, 5, 1) if samples.x.dim() == 3 else nn.Linear(4, 5)


@pytest.mark.parametrize("length", [(), (6,)])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_what_others_say_of_the_whole_set(length: tuple[int, ...], weighted: bool) -> None:
    samples = Samples(61, *length)
    if length:
        samples.y[5], samples.y[7, :3] = -100, -100
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0]) if weighted else None
    report = report_of(samples, nn.CrossEntropyLoss(weight=weight))
    assert report is not None and (report.num_seen, report.num_samples) == (61, 61)
    with torch.no_grad():
        output = net(samples)(samples.x)
    each = cross_entropy(output, samples.y, weight=weight, reduction="none")
    counted = samples.y != -100
    labels, predicted = samples.y[counted].numpy(), output.argmax(1)[counted].numpy()
    assert (report.confusion == confusion_matrix(labels, predicted, labels=range(5))).all()
    there = [0, 1, 2, 3]
    np.testing.assert_allclose(report.recall[:4], recall_score(labels, predicted, average=None, labels=there))
    said = precision_score(labels, predicted, average=None, labels=there, zero_division=np.nan)
    np.testing.assert_allclose(report.precision[:4], said)
    expected = [float(each[samples.y == c].mean()) for c in there]
    np.testing.assert_allclose(report.loss[:4], expected, rtol=1e-5)
    assert np.isnan(report.loss[4]) and np.isnan(report.recall[4])
    means = np.array([float(e[c].mean()) if c.any() else -1.0 for e, c in zip(each, counted, strict=True)])
    assert [s.number for s in report.worst] == np.argsort(-means, kind="stable")[:25].tolist()
    np.testing.assert_allclose([s.loss for s in report.worst], np.sort(means)[::-1][:25], rtol=1e-5)
    assert torch.equal(report.worst[0].inputs, samples.x[report.worst[0].number])


def test_a_part_of_a_set_that_takes_long_is_spread_over_the_set() -> None:
    calls = iter([False, False, False, True])
    report = report_of(Samples(80), nn.CrossEntropyLoss(), size=10, enough=lambda: next(calls))
    assert report is not None and report.num_seen == 40 == report.confusion.sum()
    assert {s.number // 10 for s in report.worst} == {0, 2, 4, 6}


class AlwaysMean(nn.CrossEntropyLoss):
    """A loss of a user's that knows no reduction."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target)


def test_a_loss_that_gives_nothing_for_single_labels_has_no_report() -> None:
    assert report_of(Samples(20), AlwaysMean()) is None


def test_labels_that_give_nan_are_the_worst() -> None:
    samples = Samples(20)
    samples.x[13] = torch.nan
    report = report_of(samples, nn.CrossEntropyLoss())
    assert report is not None and (report.worst[0].number, report.worst[0].loss) == (13, float("inf"))


def test_the_files_of_digits(tmp_path: Path) -> None:
    config = compose(["experiment=digits", "workers=1"]).config
    prepared = prepare(config, cores=1.0, gpus=0.0)
    paths = write_class_report(config, prepared, tmp_path, 12)
    names = [
        "confusion.csv",
        "classes.csv",
        "worst_samples.csv",
        "confusion.png",
        "class_loss.png",
        "worst_samples.png",
    ]
    assert [path.name for path in paths] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths if path.suffix == ".png")
    rows = list(csv.reader(paths[0].open(encoding="utf-8")))
    assert prepared.evaluate is not None and rows[0] == ["class", *map(str, range(10))]
    assert sum(int(n) for row in rows[1:] for n in row[1:]) == len(prepared.evaluate)
    worst = list(csv.DictReader(paths[2].open(encoding="utf-8")))
    assert len({row["sample"] for row in worst}) == 25


def test_no_files_where_nothing_is_classified(tmp_path: Path) -> None:
    torch.manual_seed(0)
    np.savez(tmp_path / "d.npz", inputs=np.random.rand(40, 3).astype("f4"), targets=np.random.rand(40, 1).astype("f4"))
    config = compose(["data=arrays", f"data.path={tmp_path}/d.npz", "loss=mse", "workers=1", "batch.size=8"]).config
    prepared = prepare(config, cores=1.0, gpus=0.0)
    assert write_class_report(config, prepared, tmp_path / "out", 1) == [] and not (tmp_path / "out").exists()
