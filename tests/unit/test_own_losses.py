"""A loss of any kind is read as its author means it, or refused by name before the run."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from descent.config import compose
from descent.data.base import TensorData
from descent.errors import ConfigError, DataError, DescentError
from descent.training.objective import Objective, Reading
from descent.training.plan import Prepared, prepare
from descent.training.preflight import check_outputs


def prepared(*overrides: str) -> Prepared:
    run = ["trusted_modules=[tests]", "batch.size=30", "slots=3", "workers=3", *overrides]
    return prepare(compose(run).config, cores=4.0, gpus=0.0)


def with_loss(name: str, *overrides: str) -> Prepared:
    return prepared("~loss.label_smoothing", f"loss._target_=tests.own_losses.{name}", *overrides)


def data(name: str, *overrides: str) -> list[str]:
    return ["data=custom", f"data.train._target_=tests.own_losses.{name}", "data.holdout=0.2", *overrides]


@pytest.mark.parametrize(
    ("name", "reading"),
    [
        ("Sum", Reading.TOTAL),
        ("Focal", Reading.SAMPLES),
        ("SmoothedAsTorch", Reading.TERMS),
        ("EvenPair", Reading.PAIR),
        ("DrawnByNumpy", Reading.PAIR),
        ("DrawsFromTorch", Reading.SAMPLES),
        ("Trained", Reading.SAMPLES),
        ("DrawsElsewhere", Reading.SAMPLES),
    ],
)
def test_how_a_loss_is_read(name: str, reading: Reading) -> None:
    found = with_loss(name)
    assert found.task.objective.reading == found.plan.loss_reading == reading
    assert found.plan.uses_non_torch_rng is (name == "DrawsElsewhere")
    assert not any(name.startswith("loss.") for name, _ in found.model.named_parameters())


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("Trained", ("loss.temperature",)),
        ("TrainedInside", ("loss.head.bias", "loss.head.weight")),
        ("TrainedInAnObject", ("loss.head.bias", "loss.head.weight")),
        ("Focal", ()),
    ],
)
def test_parameters_of_a_loss_are_found_wherever_they_lie(name: str, trained: tuple[str, ...]) -> None:
    assert with_loss(name).trained_of_loss == trained


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("FocalAroundAMean", r"neither the mean nor the sum.*return \(total, count\).*slots=1"),
        ("EvenMean", r"neither the mean nor the sum.*return \(total, count\)"),
        ("Contrastive", "compares the samples of a batch with each other.*slots=1"),
        ("PairThatDoesNotAdd", r"its \(total, count\) don't add up"),
        ("NegativeCount", "with the count -2; it must be 0 or more"),
        ("Running", "changes its own 'scale' from call to call"),
        ("Counting", "changes its own 'calls' from call to call"),
        ("remembering", "changes its own 'calls' from call to call"),
        ("DrawnByItsOwnGenerator", "two of them built with seed=0 differ in 'weight'"),
        ("OwnGenerator", "draws from a generator of its own that nothing seeds"),
    ],
)
def test_what_would_be_read_wrongly_is_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"loss\._target_=tests\.own_losses\.{name}: .*{why}"):
        with_loss(name)


@pytest.mark.parametrize("name", ["FocalAroundAMean", "Contrastive"])
def test_a_loss_of_the_whole_batch_is_taken_where_each_batch_is_computed_whole(name: str) -> None:
    assert with_loss(name, "slots=1", "workers=1").task.objective.reading is Reading.SAMPLES


@pytest.mark.parametrize("loss", [nn.KLDivLoss(), nn.KLDivLoss(reduction="batchmean"), nn.KLDivLoss(reduction="sum")])
def test_torchs_own_losses_are_those_that_their_author_built(loss: nn.KLDivLoss) -> None:
    output, target = torch.randn(6, 4).log_softmax(1), torch.rand(6, 4).softmax(1)
    wanted = loss(output, target)
    objective = Objective.of(loss)
    parts = [objective(output[a:b], target[a:b]) for a, b in ((0, 1), (1, 4), (4, 6))]
    total, terms = (sum(float(x) for x in column) for column in zip(*parts, strict=True))
    assert total / (terms or 1.0) == pytest.approx(float(wanted), rel=1e-5)
    assert loss.reduction in ("mean", "batchmean", "sum")  # the author's object is left alone


def test_classes_stand_where_torch_has_them() -> None:
    """Also where there are as many places as classes: [n, C, C] with targets [n, C]."""
    output, target = torch.randn(5, 3, 3), torch.randint(3, (5, 3))
    objective = Objective.of(nn.CrossEntropyLoss())
    loss = objective(output, target)
    assert float(loss.total) / float(loss.terms) == pytest.approx(float(F.cross_entropy(output, target)), rel=1e-6)
    assert int(objective.num_correct(output, target)) == int((output.argmax(1) == target).sum())
    last = Objective.of(nn.CrossEntropyLoss(), classes_last=True)
    wanted = F.cross_entropy(output.transpose(1, 2), target)
    assert float(last(output, target).total) / 15 == pytest.approx(float(wanted), rel=1e-6)
    assert int(last.num_correct(output, target)) == int((output.argmax(2) == target).sum())
    image, places = torch.randn(2, 4, 4, 4), torch.randint(4, (2, 4, 4))
    assert int(objective.num_correct(image, places)) == int((image.argmax(1) == places).sum())


@pytest.mark.parametrize(
    ("more", "classes_last"),
    [
        ([], False),
        (["+model.classes_last=true"], True),
        (["+data.train.tokens=true", "+model.classes_last=true"], True),
        (["+data.train.tokens=true", "+model.classes_last=false"], False),
    ],
)
def test_where_the_classes_stand_is_decided_once_for_the_run(more: list[str], classes_last: bool) -> None:
    run = [*data("Places"), "model=custom", "model._target_=tests.own_losses.ThreeByThree", "batch.size=12", *more]
    assert prepared(*run).plan.classes_last is classes_last


def test_tokens_with_as_many_classes_as_places_must_say_which_is_which() -> None:
    run = [*data("Places"), "model=custom", "model._target_=tests.own_losses.ThreeByThree", "batch.size=12"]
    with pytest.raises(ConfigError, match=r"can be read in two ways.*classes_last = True"):
        prepared(*run, "+data.train.tokens=true")


def test_a_language_model_is_one_also_where_its_context_is_as_long_as_its_vocabulary() -> None:
    run = ["model=gpt_tiny", "data=stdlib", "data.block=256", "data.max_bytes=9000", "batch.size=3", "slots=1"]
    found = prepared(*run, "workers=1")
    assert found.train.num_outputs == 256 and found.plan.classes_last is True
    inputs, targets = found.train.gather(torch.arange(2).numpy())
    output = found.model(inputs)
    assert output.shape == (2, 256, 256)
    wanted = F.cross_entropy(output.flatten(0, 1), targets.flatten(), reduction="sum")
    assert float(found.task.objective(output, targets).total.detach()) == pytest.approx(
        float(wanted.detach()), rel=1e-6
    )


@pytest.mark.parametrize("row", ["false", "true"])
def test_class_labels_in_floating_point_are_refused_by_name(row: str) -> None:
    for outputs in (["model.num_outputs=1"], []):
        with pytest.raises(DescentError, match=r"class labels must be whole numbers.*store the labels as integers"):
            prepared(*data("FloatLabels"), f"+data.train.row={row}", "batch.size=12", *outputs)


def test_a_classifier_with_one_output_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"with one output there is one class, and the loss is always 0"):
        prepared("model.num_outputs=1")


def test_probabilities_are_targets_too() -> None:
    assert prepared(*data("Probabilities"), "batch.size=12").task.objective.by_class


def test_a_set_without_a_label_that_counts_is_refused() -> None:
    labels = torch.full((40,), -100)
    ignored = TensorData(torch.randn(40, 4), labels, num_outputs=3, name="ignored", source="here")
    objective = Objective.of(nn.CrossEntropyLoss())
    config = compose([]).config
    with pytest.raises(DataError, match=r"data\.evaluate: all 40 labels are ignored \(ignore_index=-100\)"):
        check_outputs(config, nn.Linear(4, 3), objective, ignored, "data.evaluate")


def test_labels_that_have_to_be_read_are_looked_at_too() -> None:
    with pytest.raises(DataError, match=r"data\.train: all 48 labels are ignored"):
        prepared(*data("AllIgnored"), "batch.size=12")


def test_a_sparse_gradient_is_refused_where_it_can_not_be_added_up() -> None:
    for reduction in ("fast", "exact"):
        run = ["model=custom", "model._target_=tests.own_losses.SparseLookUp", f"reduction={reduction}"]
        if reduction == "exact":
            assert prepared(*run).plan.slots == 3
            run += ["slots=1", "workers=1"]
        with pytest.raises(ConfigError, match=r"gradient of 'table' is sparse.*sparse=False.*reduction=exact"):
            prepared(*run)
