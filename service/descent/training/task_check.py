"""The user's task on one batch, before any worker exists: what its numbers mean, and what can't be trained.

A step computes its batch in parts, so the numbers of a task must add up over the parts. A task that is read
wrongly would train on other numbers without a word; so each is read right, or refused with what to change.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from descent.config import RunConfig
from descent.config.build import in_one_line
from descent.data.base import Data
from descent.data.batch import describe
from descent.data.generators import own_generators
from descent.errors import ConfigError, DataError, DescentError
from descent.training.buffer_rules import find_rules
from descent.training.buffers import Rule
from descent.training.carried import STATELESS, Kept, carried_state
from descent.training.determinism import refuse_undeterministic
from descent.training.evaluation_results import State, described
from descent.training.loss_check import numbers_kept
from descent.training.loss_parameters import attached
from descent.training.measure import Measure
from descent.training.metric_states import MetricSet
from descent.training.model_snapshot import ModelSnapshot
from descent.training.objective import Reading
from descent.training.phases import Phase, task_between, task_in, trained_alone
from descent.training.preflight import Cut, check_single_samples, refuse_sparse
from descent.training.results import MicroBatchLoss
from descent.training.task import OwnTask, Supervised
from descent.training.task_meaning import Samples, few_of, loss_of, meaning_of, samples_of

_SAMPLES = 8
"""Samples on which the meaning of a loss is found out."""


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
    few, more = samples_of(config, data, min(2, most)), samples_of(config, data, min(_SAMPLES, most), spread=True)
    kept = dict(numbers_kept(task.task))
    before, attributes = ModelSnapshot.of(model), Kept.of(model, task.task)
    model.train()
    with own_generators(seed=0) as drew:
        loss = loss_of(task, model, few)
        drawn = drew()
    task = replace(task, names=tuple(loss.logged))
    _backward(task, model, loss)
    written = before.written(model)
    again = lambda batch: task.loss(model, batch, range(few.num)).total  # noqa: E731
    carried = carried_state(attributes, before, model, task.task, few.batch, few.num, again, loss.total)
    if carried is not None:
        raise ConfigError(f"{task.where}: model or task carry {carried!r} from batch to batch; {STATELESS}")
    if cut.smallest == 1:
        check_single_samples(config, lambda: loss_of(task, model, samples_of(config, data, 1)))
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
        rules = find_rules(model, written, lambda a, b: loss_of(task, model, few_of(more, a, b)), more.num, where)
    # In full precision, in which nothing but the meaning can tell the parts from the whole.
    precise = replace(task, autocast=contextlib.nullcontext)
    precise, terms, understood = meaning_of(precise, model, more, whole=cut.whole)
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


def _refuse_nothing_counted(config: RunConfig, task: OwnTask, model: nn.Module, data: Data, most: int) -> None:
    """Raise ConfigError where the losses of many samples count nothing."""
    looked_at = 0
    for count in (min(_SAMPLES, most), min(8 * _SAMPLES, most)):
        samples = samples_of(config, data, count, spread=True)
        looked_at = samples.num
        with torch.no_grad(), own_generators(seed=0):
            if float(loss_of(task, model, samples).terms):
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
    config: RunConfig, task: OwnTask, model: nn.Module, samples: Samples, first: MicroBatchLoss, kept: Kept
) -> None:
    with own_generators(seed=0), torch.no_grad():
        again = loss_of(task, model, samples)
    if config.reduction == "exact" and not _same(first.total, again.total):
        raise ConfigError(
            f"{task.where}: gives {float(first.total):.9g} and then {float(again.total):.9g} for the same samples, weights "
            f"and seeds: model or task keep {kept.named(model, task.task)}, which no checkpoint holds and no other worker "
            "has; make it a buffer of the model (register_buffer), or use reduction=fast, which doesn't promise equal bits; "
            "or, where it is a state that is carried from batch to batch, begin each forward with a new one"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.detach().nan_to_num(), other.detach().nan_to_num())


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
    samples = samples_of(config, data, count, spread=True)
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
