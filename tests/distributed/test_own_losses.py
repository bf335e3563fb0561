"""Losses of every kind train and evaluate on the number that their author built, for any number of workers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from descent.training.input.sampling import SampleOrder
from descent.training.plan import build_data, build_model
from tests import own_losses
from tests.distributed.replicas import Case, Crew

STEPS, BATCH = 10, 24
WEIGHTS = [0.2, 3.0, 1.0, 0.5, 2.0, 1.0, 1.0, 0.1, 1.0, 4.0]
RUN = [
    "optimizer=sgd",
    "optimizer.lr=0.02",
    "schedule=constant",
    f"batch.size={BATCH}",
    f"steps={STEPS}",
    "epochs=null",
    "evaluate.every=end",
    "evaluate.batch_size=50",
    "trusted_modules=[tests]",
]
OWN = ["~loss.label_smoothing", "loss._target_=tests.own_losses."]
PROBABILITIES = ["data=custom", "data.train._target_=tests.own_losses.Probabilities", "data.holdout=0.2"]
PLACES = [
    "data=custom",
    "data.train._target_=tests.own_losses.Places",
    "data.holdout=0.2",
    "model=custom",
    "model._target_=tests.own_losses.ThreeByThree",
]
Loss = Callable[[Tensor, Tensor], Tensor]


def even_mean(output: Tensor, target: Tensor) -> Tensor:
    return own_losses.EvenMean()(output, target)


KINDS: dict[str, tuple[list[str], Loss]] = {
    "a sum": ([OWN[0], OWN[1] + "Sum", "optimizer.lr=0.001"], own_losses.Sum()),
    "torch's sum": (["+loss.reduction=sum", "optimizer.lr=0.001"], nn.CrossEntropyLoss(reduction="sum")),
    "total and count": ([OWN[0], OWN[1] + "EvenPair"], even_mean),
    "focal": ([OWN[0], OWN[1] + "Focal"], own_losses.Focal()),
    "kl, by element": ([*PROBABILITIES, OWN[0], "loss._target_=torch.nn.KLDivLoss"], nn.KLDivLoss()),
    "probabilities": ([*PROBABILITIES], nn.CrossEntropyLoss()),
    "classes in dimension 1": ([*PLACES], nn.CrossEntropyLoss()),
}


def plain_loop(case: Case, loss_of: Loss) -> tuple[list[float], float, float]:
    """(loss of each step, loss and accuracy on the held-out set at the end)."""
    train, held_out = build_data(case.config)
    assert held_out is not None
    model = build_model(case.config, train)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.config.optimizer["lr"])
    order, losses = SampleOrder(len(train), BATCH, case.config.seed), []
    for step in range(STEPS):
        inputs, targets = train.gather(order.samples_of(step + 1))
        optimizer.zero_grad()
        loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    inputs, targets = held_out.gather(torch.arange(len(held_out)).numpy())
    with torch.no_grad():
        output = model.eval()(inputs)
    right = output.argmax(1) == (targets.argmax(1) if targets.is_floating_point() else targets)
    return losses, loss_of(output, targets).item(), right.float().mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_a_plain_loop(pool: Crew, tmp_path: Path, kind: str) -> None:
    overrides, loss_of = KINDS[kind]
    case = Case.of([*RUN, *overrides, "reduction=exact"], tmp_path)
    losses, held_out, accuracy = plain_loop(case, loss_of)
    hashes = set()
    for world in (1, 3):
        reports = pool.train(case, world)[0]
        assert reports.losses == pytest.approx(losses, rel=1e-4, abs=1e-5)
        evaluated = reports.metrics[-1][1]
        assert evaluated["eval/loss"] == pytest.approx(held_out, rel=1e-4, abs=1e-5)
        if "eval/accuracy" in evaluated:
            assert evaluated["eval/accuracy"] == pytest.approx(accuracy)
        hashes.add(reports.sha256)
    assert len(hashes) == 1


def test_a_parameter_that_only_the_loss_uses_is_trained_where_the_model_holds_it(pool: Crew, tmp_path: Path) -> None:
    """What the refusal of a loss with parameters gives as the cure."""
    own = ["model=custom", "model._target_=tests.own_losses.Tempered", "optimizer.lr=0.5"]
    task = ["task=custom", "task._target_=tests.own_losses.tempered"]
    case = Case.of([*RUN, *own, *task, "reduction=exact"], tmp_path)
    train, _ = build_data(case.config)
    model, losses = build_model(case.config, train), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    order = SampleOrder(len(train), BATCH, case.config.seed)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = own_losses.tempered(model, train.gather(order.samples_of(step + 1)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(model.temperature.item() - 1.0) > 0.01
    told = [pool.train(case, world)[0] for world in (1, 2)]
    assert told[0].losses == pytest.approx(losses, rel=1e-4)
    assert told[0].sha256 == told[1].sha256


def test_an_accuracy_counts_labels_whatever_their_classes_weigh(pool: Crew, tmp_path: Path) -> None:
    """The loss is divided by weights; the share of right answers is not."""
    case = Case.of([*RUN, "reduction=exact"], tmp_path)
    reports = pool.train(case, 2, tamper={0: Reweigh(), 1: Reweigh()})[0]
    losses, held_out, accuracy = plain_loop(case, nn.CrossEntropyLoss(weight=torch.tensor(WEIGHTS)))
    assert reports.losses == pytest.approx(losses, rel=1e-4)
    evaluated = reports.metrics[-1][1]
    assert evaluated["eval/loss"] == pytest.approx(held_out, rel=1e-4)
    assert evaluated["eval/accuracy"] == pytest.approx(accuracy)


class Reweigh:
    """Gives the loss class weights, which a config has no way to write yet."""

    def __call__(self, trainer: object) -> None:
        trainer.task.objective.loss.weight = torch.tensor(WEIGHTS)  # type: ignore[attr-defined]
