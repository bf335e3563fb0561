"""The user's task on one batch, before any worker exists: what its numbers mean, and what can't be trained.

A step computes its batch in parts, so the numbers of a task must add up over the parts. A task that is read
wrongly would train on other numbers without a word; so each is read right, or refused with what to change.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from descent.config import RunConfig
from descent.config.build import in_one_line
from descent.data.base import Data
from descent.data.batch import Batch, describe, num_rows, rows, tensors_of
from descent.data.generators import own_generators
from descent.errors import ConfigError, DataError, DescentError, TrainingError
from descent.training.buffer_rules import find_rules
from descent.training.buffers import Rule
from descent.training.carried import STATELESS, Kept, asks_for_state, carried_state
from descent.training.coupling import features_of
from descent.training.determinism import refuse_undeterministic
from descent.training.evaluation_results import State, described
from descent.training.loss_check import numbers_kept
from descent.training.loss_parameters import attached
from descent.training.measure import Measure
from descent.training.metric_states import MetricSet
from descent.training.model_loss import IGNORED, labels_of, with_labels
from descent.training.model_snapshot import ModelSnapshot
from descent.training.objective import Reading
from descent.training.phases import Phase, task_between, task_in, trained_alone
from descent.training.preflight import Cut, check_single_samples, read, refuse_sparse
from descent.training.results import MicroBatchLoss
from descent.training.task import OwnTask, Supervised

_SAMPLES = 8
"""Samples on which the meaning of a loss is found out."""
_CLOSE = 3e-5
"""Relative difference that rounding in float32 explains."""
WAYS_OUT = (
    "if the loss compares the samples of a batch with each other, give the task the two methods features(model, batch), "
    "one row a sample, and couple(features), the loss of the whole batch; or compute each batch whole, with slots=1 "
    "and batch.micro_size=auto"
)


@dataclass(frozen=True)
class Found:
    """What a few samples showed of a model and a task."""

    task: Supervised | OwnTask
    """The task, with the meaning of its loss and the names of its further numbers."""
    changing_buffers: tuple[str, ...]
    buffer_rules: tuple[Rule, ...]
    uses_non_torch_rng: bool
    """Whether random numbers were drawn that are not torch's."""
    unused_parameters: bool
    reading: Reading | None
    """What the loss's number for a batch means; None for an own loss that says so itself."""
    terms: float
    """Loss terms a sample."""
    understood: str = ""
    """What an own task's numbers were understood to mean, in words."""
    phases: tuple[Phase, ...] = ()
    """The losses that take turns, with what their numbers mean."""


@contextlib.contextmanager
def _steady(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in training mode, but for the layers whose output depends on chance or on the
    other samples of a batch (dropout, batch norm)."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            module.eval()
    try:
        yield
    finally:
        model.train()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode, in which attention drops nothing either."""
    model.eval()
    try:
        yield
    finally:
        model.train()


class _Samples(NamedTuple):
    """A batch and how to get parts of it."""

    batch: Batch
    num: int
    part: Callable[[int, int], Batch]
    """The samples first … stop-1 as a batch, cut out of the whole."""
    collated: Callable[[int, int], Batch]
    """The same samples, collated anew."""
    steady: Callable[[nn.Module], contextlib.AbstractContextManager[None]] = _steady
    """The mode of the model in which numbers are compared."""


def check_task(
    config: RunConfig,
    model: nn.Module,
    task: OwnTask,
    data: Data,
    cut: Cut,
) -> Found:
    """Forward, backward and evaluation on a few samples; the model is left as it was.

    Raises ConfigError or DataError.
    """
    most = min(len(data), max(1, cut.micro))
    few, more = _samples(config, data, min(2, most)), _samples(config, data, min(_SAMPLES, most), spread=True)
    kept = dict(numbers_kept(task.task))
    before, attributes = ModelSnapshot.of(model), Kept.of(model, task.task)
    model.train()
    with own_generators(seed=0) as drew:
        loss = _loss(task, model, few)
        drawn = drew()
    task = replace(task, names=tuple(loss.logged))
    _backward(task, model, loss)
    written = before.written(model)
    again = lambda batch: task.loss(model, batch, range(few.num)).total  # noqa: E731
    carried = carried_state(attributes, before, model, task.task, few.batch, few.num, again, loss.total)
    if carried is not None:
        raise ConfigError(f"{task.where}: model or task carry {carried!r} from batch to batch; {STATELESS}")
    if cut.smallest == 1:
        check_single_samples(config, lambda: _loss(task, model, _samples(config, data, 1)))
    objection = before.objection(model, written)
    if objection is not None:
        raise ConfigError(f"model._target_={config.model['_target_']}: {objection}")
    before.put_back(model)
    _check_repeats(config, task, model, few, loss, attributes)
    before.put_back(model)
    unused = any(p.grad is None for p in model.parameters() if p.requires_grad)
    refuse_sparse(config, model, cut.slots == 1)
    model.zero_grad(set_to_none=True)
    rules: tuple[Rule, ...] = ()
    if written and cut.slots > 1:
        where = f"model._target_={config.model['_target_']}"
        rules = find_rules(model, written, lambda a, b: _loss(task, model, few_of(more, a, b)), more.num, where)
    # In full precision, in which nothing but the meaning can tell the parts from the whole.
    precise = replace(task, autocast=contextlib.nullcontext)
    precise, terms, understood = _meaning(precise, model, more, whole=cut.whole)
    task = replace(task, reading=precise.reading)
    before.put_back(model)
    if task.reading is not Reading.TOTAL:
        _refuse_nothing_counted(config, task, model, data, most)
        before.put_back(model)
    changed = next((name for name, value in numbers_kept(task.task) if kept.get(name) != value), None)
    if changed is not None:
        raise ConfigError(
            f"{task.where}: changes its own {changed!r} from call to call, which no checkpoint holds and which differs "
            "from worker to worker; make the task a function of model and batch, or move what it keeps into the model "
            "as a buffer"
        )
    return Found(task, written, rules, bool(drawn - {"torch"}), unused, task.reading, terms, understood)


def check_phases(
    config: RunConfig, model: nn.Module, task: OwnTask, phases: Sequence[Phase], data: Data, cut: Cut
) -> Found:
    """`check_task` for each phase, with the others' modules frozen. Raises ConfigError or DataError."""
    settled, found = list[Phase](), list[Found]()
    for phase in phases:
        own = replace(task_in(task, phase), names=None)
        with trained_alone(model, phase):
            seen = check_task(config, model, own, data, cut)
        found.append(seen)
        nominal = 1.0 if seen.reading is Reading.TOTAL else seen.terms * cut.batch
        reading = None if seen.reading is None else str(seen.reading)
        settled.append(replace(phase, reading=reading, logged=seen.task.logged, nominal=nominal))
    between = task_between(task, settled)
    rules = {n: rule for seen in found for n, rule in zip(seen.changing_buffers, seen.buffer_rules, strict=False)}
    names = tuple(dict.fromkeys(name for seen in found for name in seen.changing_buffers))
    return replace(
        found[0],
        task=between,
        changing_buffers=names,
        buffer_rules=tuple(rules[name] for name in names) if rules else (),
        uses_non_torch_rng=any(seen.uses_non_torch_rng for seen in found),
        unused_parameters=True,
        understood="; of ".join(f"{phase.name} {seen.understood}" for phase, seen in zip(phases, found, strict=True)),
        phases=tuple(settled),
    )


def few_of(samples: _Samples, first: int, stop: int) -> _Samples:
    """Some of these samples."""
    batch = samples.part(first, stop)
    return _Samples(batch, stop - first, lambda a, b: rows(batch, a, b), lambda a, b: rows(batch, a, b))


def _samples(config: RunConfig, data: Data, count: int, *, spread: bool = False) -> _Samples:
    chosen = np.linspace(0, len(data) - 1, count).astype(np.int64) if spread else np.arange(count)
    with own_generators(seed=0):
        batch = read(config, data, chosen, "data.train")

    def collated(first: int, stop: int) -> Batch:
        with own_generators(seed=0):
            return read(config, data, chosen[first:stop], "data.train")

    cut = num_rows(batch) == count
    return _Samples(batch, count, (lambda a, b: rows(batch, a, b)) if cut else collated, collated)


def _loss(task: OwnTask, model: nn.Module, samples: _Samples) -> MicroBatchLoss:
    """The loss of some samples, with its graph. Raises ConfigError for whatever goes wrong in the user's code."""
    try:
        found = task.loss(model, samples.batch, range(samples.num))
    except DescentError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:
        refuse_undeterministic(error)
        state = asks_for_state(error)
        if state is not None:
            raise ConfigError(
                f"{task.where}: the model's forward takes {state!r} beside the inputs; {STATELESS}"
            ) from error
        raise ConfigError(
            f"{task.where}: its loss failed for {samples.num} samples, {describe(samples.batch)}: {in_one_line(error)}"
        ) from error
    count = float(found.terms)
    if not 0.0 <= count < math.inf:
        raise ConfigError(f"{task.where}: gives the count {count:g}; a count is what a mean divides by: 0 or more")
    return found


def _refuse_nothing_counted(config: RunConfig, task: OwnTask, model: nn.Module, data: Data, most: int) -> None:
    """Raise ConfigError where the losses of many samples count nothing."""
    looked_at = 0
    for count in (min(_SAMPLES, most), min(8 * _SAMPLES, most)):
        samples = _samples(config, data, count, spread=True)
        looked_at = samples.num
        with torch.no_grad(), own_generators(seed=0):
            if float(_loss(task, model, samples).terms):
                return
    raise ConfigError(
        f"{task.where}: its count is 0 for {looked_at} samples from everywhere in the training set, so there is nothing to "
        "learn from; a count is what the mean divides by, such as the number of labels that are not ignored"
    )


def _backward(task: OwnTask, model: nn.Module, loss: MicroBatchLoss) -> None:
    if not loss.total.requires_grad:
        raise ConfigError(
            f"{task.where}: no gradient reaches the model's parameters from the loss; is something detached, or under "
            "no_grad?"
        )
    try:
        loss.total.backward()
    except Exception as error:
        refuse_undeterministic(error)
        raise ConfigError(f"{task.where}: the backward failed: {in_one_line(error)}") from error
    of_loss = attached(model)
    if all(p.grad is None for name, p in model.named_parameters() if name not in of_loss):
        raise ConfigError(f"{task.where}: the loss doesn't depend on the model's parameters")
    trained = {id(p) for p in model.parameters()}
    for name, parameter in _parameters_of(task.task):
        if parameter.grad is not None and id(parameter) not in trained:
            raise ConfigError(
                f"{task.where}: a gradient reaches its own parameter {name!r}, which no optimizer trains and no "
                "checkpoint holds; move the parameter into the model, make it a parameter of the task itself, or, if it is "
                "to stay as it is (a teacher), call requires_grad_(False) on it or use it under torch.no_grad()"
            )


def _parameters_of(task: Any) -> Iterator[tuple[str, nn.Parameter]]:
    if isinstance(task, nn.Module):
        yield from task.named_parameters()
    for name, value in vars(task).items() if hasattr(task, "__dict__") else ():
        if isinstance(value, nn.Parameter):
            yield name, value
        elif isinstance(value, nn.Module):
            for inner, parameter in value.named_parameters():
                yield f"{name}.{inner}", parameter


def _check_repeats(
    config: RunConfig, task: OwnTask, model: nn.Module, samples: _Samples, first: MicroBatchLoss, kept: Kept
) -> None:
    with own_generators(seed=0), torch.no_grad():
        again = _loss(task, model, samples)
    if config.reduction == "exact" and not _same(first.total, again.total):
        raise ConfigError(
            f"{task.where}: gives {float(first.total):.9g} and then {float(again.total):.9g} for the same samples, weights "
            f"and seeds: model or task keep {kept.named(model, task.task)}, which no checkpoint holds and no other worker "
            "has; make it a buffer of the model (register_buffer), or use reduction=fast, which doesn't promise equal bits; "
            "or, where it is a state that is carried from batch to batch, begin each forward with a new one"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.detach().nan_to_num(), other.detach().nan_to_num())


def _meaning(task: OwnTask, model: nn.Module, samples: _Samples, *, whole: bool) -> tuple[OwnTask, float, str]:
    """(the task with its reading, loss terms a sample, what was understood): whether the numbers add up over parts."""
    n = samples.num
    if task.couples:
        _check_features(task, model, samples)
        return replace(task, reading=Reading.SAMPLES), 1.0, "computed from the features of the whole global batch"
    chance = False
    for steady in (_steady, _evaluating):
        with steady(model), torch.no_grad(), own_generators(seed=0) as drew:
            try:
                raw = task.raw_loss(model, samples.batch)
            except Exception:  # a model that has no loss in evaluation mode
                break
            chance = bool(drew())
        if not chance:
            samples = samples._replace(steady=steady)
            break
    value = raw["loss"] if isinstance(raw, Mapping) and "loss" in raw else raw
    comparable = not (chance or whole or n < 2)
    unchecked = " (not checked, because the loss draws random numbers)" if chance else ""
    if isinstance(value, Tensor) and (value.dim() == 0 or (value.numel() == 1 and n > 1)):
        task = _bare(task, model, samples) if comparable else replace(task, reading=Reading.SAMPLES)
        assert task.reading is not None
        counted = _loss(task, model, samples) if task.reading is not Reading.TOTAL else None
        terms = 1.0 if counted is None else float(counted.terms) / n or 1.0
        return task, terms, _IN_WORDS[task.reading] + unchecked
    found = _parts(task, model, samples, samples.part, n // 2)
    if comparable and not found.adds_up and not _parts(task, model, samples, samples.collated, n // 2).adds_up:
        raise ConfigError(f"{task.where}: its (total, count) don't add up: {n} samples give {found}; {WAYS_OUT}")
    if isinstance(value, Tensor):
        return task, 1.0, "one loss a sample"
    terms = float(_loss(task, model, samples).terms) / n
    return task, terms or 1.0, f"a total and a count, {terms:.4g} a sample at first{unchecked}"


def _check_features(task: OwnTask, model: nn.Module, samples: _Samples) -> None:
    """Whether the features of a sample don't depend on the other samples. Raises ConfigError."""
    n = samples.num

    def features(batch: Batch, num: int, drew: list[bool]) -> list[Tensor]:
        with _steady(model), torch.no_grad(), own_generators(seed=0) as draws:
            try:
                found = features_of(task, model, batch, num)
            except TrainingError as error:
                raise ConfigError(str(error)) from error
            drew.append(bool(draws()))
        return [tensor for _, tensor in tensors_of(found)]

    drew: list[bool] = []
    whole = features(samples.batch, n, drew)
    if n < 2 or any(drew):
        return
    halves = zip(*(features(samples.part(a, b), b - a, drew) for a, b in ((0, n // 2), (n // 2, n))), strict=True)
    for one, parts in zip(whole, halves, strict=True):
        scale = float(one.double().abs().max())
        if not torch.allclose(one.double(), torch.cat(parts).double(), rtol=_CLOSE, atol=_CLOSE * scale):
            raise ConfigError(
                f"{task.where}: the features of a sample depend on the other samples of its batch, but a batch is "
                "computed in parts; let couple(features) do whatever compares samples"
            )


_IN_WORDS = {
    Reading.SAMPLES: "a mean over samples",
    Reading.LABELS: f"a mean over the labels that are not {IGNORED}",
    Reading.NEXT_LABELS: f"a mean over the labels that are not {IGNORED}, without the first of each sequence",
    Reading.TOTAL: "a sum over samples, divided by nothing",
}


class _Parts(NamedTuple):
    """A loss of all samples beside those of two parts."""

    whole: tuple[float, float]
    """(total, count)."""
    parts: tuple[float, float]
    """(total, count) of the parts, added up."""
    size: float
    """The sum of the parts' absolute totals, by which rounding is measured where totals cancel out."""

    @property
    def adds_up(self) -> bool:
        (total, count), (added, counts) = self.whole, self.parts
        if not all(map(math.isfinite, (total, count, added, counts))):
            return True
        return abs(total - added) <= _CLOSE * max(abs(total), self.size) + 1e-9 and _close(count, counts)

    def __str__(self) -> str:
        (a, b), (c, d), _ = self
        return f"({a:.6g}, {b:.6g}), their parts together ({c:.6g}, {d:.6g})"


def _parts(task: OwnTask, model: nn.Module, samples: _Samples, part: Callable[[int, int], Batch], cut: int) -> _Parts:
    def numbers(batch: Batch, num: int) -> tuple[float, float]:
        with samples.steady(model), torch.no_grad(), own_generators(seed=0):
            found = _loss(task, model, samples._replace(batch=batch, num=num))
        return float(found.total), float(found.terms)

    pieces = [numbers(part(a, b), b - a) for a, b in ((0, cut), (cut, samples.num))]
    added = (sum(p[0] for p in pieces), sum(p[1] for p in pieces))
    return _Parts(numbers(samples.batch, samples.num), added, sum(abs(p[0]) for p in pieces))


def _bare(task: OwnTask, model: nn.Module, samples: _Samples) -> OwnTask:
    """The task with the reading under which its bare number adds up over parts. Raises ConfigError where none does."""
    labels = labels_of(samples.batch)
    readings = [Reading.SAMPLES]
    if labels is not None and not labels.is_floating_point() and labels.dim():
        readings += [Reading.LABELS] if labels.dim() == 1 else [Reading.LABELS, Reading.NEXT_LABELS]
    fitting = _fitting(task, model, samples, readings)
    if len(fitting) > 1 and labels is not None:
        # All sequences are of one length here, so these can't be told apart; where labels are ignored they differ.
        ignoring = labels.clone()
        ignoring[0] = IGNORED
        if labels.dim() > 1:
            ignoring[0, -1:], ignoring[-1, labels.shape[1] // 2 :] = labels[0, -1:], IGNORED
        batch = with_labels(samples.batch, ignoring)
        with contextlib.suppress(ConfigError):  # a model that knows no label to ignore
            part = lambda a, b: rows(batch, a, b)  # noqa: E731
            cut = samples._replace(batch=batch, part=part, collated=part)
            fitting = _fitting(task, model, cut, fitting) or fitting
    if fitting:
        return replace(task, reading=fitting[0])
    if _fitting(task, model, samples, [Reading.TOTAL]):
        return replace(task, reading=Reading.TOTAL)
    as_mean = replace(task, reading=Reading.SAMPLES)
    n, found = samples.num, _parts(as_mean, model, samples, samples.part, samples.num // 2)
    raise ConfigError(
        f"{task.where}: its number for a batch is neither the mean nor the sum over the batch's samples or labels: {n} "
        f"samples give {found.whole[0] / n:.6g}, their halves together {found.parts[0] / n:.6g}; give "
        "descent.Mean(total, count) with the count that the mean divides by (pixels, tokens, labels that are not ignored); "
        f"{WAYS_OUT}"
    )


def _fitting(task: OwnTask, model: nn.Module, samples: _Samples, readings: list[Reading]) -> list[Reading]:
    """The readings under which the numbers of parts add up to that of the whole."""

    def fits(reading: Reading, part: Callable[[int, int], Batch]) -> bool:
        read_so = replace(task, reading=reading)
        return all(
            _parts(read_so, model, samples, part, cut).adds_up
            for cut in sorted({samples.num // 2, samples.num // 3 or 1, 1})
        )

    return [reading for reading in readings if fits(reading, samples.part) or fits(reading, samples.collated)]


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= _CLOSE * max(abs(a), abs(b)) + 1e-9


def check_evaluation(
    config: RunConfig, model: nn.Module, found: Found, train: Data, evaluate: Data | None
) -> tuple[tuple[State, ...], tuple[str, ...]]:
    """(what each part of an evaluation gives, the names of its figures), from a first evaluation of a few samples.

    Raises ConfigError or DataError.
    """
    metrics = MetricSet.of(config, train.num_outputs)
    if evaluate is None:
        if metrics.metrics:
            name = next(iter(metrics.metrics))
            raise ConfigError(f"metrics.{name}: there is nothing to evaluate on; set data.holdout, or data.evaluate")
        return (), ()
    measure = Measure(found.task, metrics, sums_up=found.reading is Reading.TOTAL)
    before = ModelSnapshot.of(model)
    most = min(len(evaluate), config.evaluate.batch_size)
    try:
        return _first_evaluation(config, model, measure, evaluate, min(_SAMPLES, most))
    except DescentError:
        # The few samples may be of one class, or count nothing; more of them decide.
        before.put_back(model)
        return _first_evaluation(config, model, measure, evaluate, min(8 * _SAMPLES, most))
    finally:
        before.put_back(model)


def _first_evaluation(
    config: RunConfig, model: nn.Module, measure: Measure, data: Data, count: int
) -> tuple[tuple[State, ...], tuple[str, ...]]:
    samples = _samples(config, data, count, spread=True)
    model.eval()
    try:
        with torch.no_grad(), own_generators(seed=0):
            part = measure.part(model, samples.batch, samples.num)
            states = described(part)
            figures = measure.figures({key: tensor for key, (_, tensor) in part.items()}, states)
    except DataError:
        raise
    except DescentError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:
        raise ConfigError(
            f"{measure.where}: failed for {samples.num} samples, {describe(samples.batch)}: {in_one_line(error)}"
        ) from error
    finally:
        model.train()
    return states, tuple(figures)
