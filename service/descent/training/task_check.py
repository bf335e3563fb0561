"""The user's task on one batch, before any worker exists: what its numbers mean, and what can't be trained.

A step computes its batch in parts, so the numbers of a task must add up over the parts. A task that is read
wrongly would train on other numbers without a word; so each is read right, or refused with what to change.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from descent.config import RunConfig
from descent.config.build import in_one_line
from descent.data.base import Data
from descent.data.batch import Batch, describe, num_rows, rows
from descent.data.generators import own_generators
from descent.errors import ConfigError, DescentError
from descent.training.buffer_rules import find_rules
from descent.training.buffers import Rule
from descent.training.determinism import refuse_undeterministic
from descent.training.loss_check import numbers_kept
from descent.training.model_snapshot import ModelSnapshot
from descent.training.objective import Reading
from descent.training.preflight import Cut, check_single_samples, read, refuse_sparse
from descent.training.results import Mean, MicroBatchLoss
from descent.training.task import OwnTask, Supervised

_SAMPLES = 8
"""Samples on which the meaning of a loss is found out."""
_CLOSE = 1e-3
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
    evaluated: tuple[str, ...]
    """Names of the means that an evaluation gives."""
    understood: str = ""
    """What an own task's numbers were understood to mean, in words."""


class _Samples(NamedTuple):
    """A batch and how to get parts of it."""

    batch: Batch
    num: int
    part: Callable[[int, int], Batch]
    """The samples first … stop-1 as a batch, cut out of the whole."""
    collated: Callable[[int, int], Batch]
    """The same samples, collated anew."""


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
    before = ModelSnapshot.of(model)
    model.train()
    with own_generators(seed=0) as drew:
        loss = _loss(task, model, few)
        drawn = drew()
    task = replace(task, logged=tuple(loss.logged))
    _backward(task, model, loss)
    if cut.smallest == 1:
        check_single_samples(config, lambda: _loss(task, model, _samples(config, data, 1)))
    written = before.written(model)
    objection = before.objection(model, written)
    if objection is not None:
        raise ConfigError(f"model._target_={config.model['_target_']}: {objection}")
    before.put_back(model)
    _check_repeats(config, task, model, few, loss)
    before.put_back(model)
    unused = any(p.grad is None for p in model.parameters() if p.requires_grad)
    refuse_sparse(config, model, cut.slots == 1)
    model.zero_grad(set_to_none=True)
    rules: tuple[Rule, ...] = ()
    if written and cut.slots > 1:
        where = f"model._target_={config.model['_target_']}"
        rules = find_rules(model, written, lambda a, b: _loss(task, model, few_of(more, a, b)), more.num, where)
    task, terms, understood = _meaning(task, model, more, whole=cut.whole)
    before.put_back(model)
    evaluated = _evaluation(task, model, more)
    before.put_back(model)
    changed = next((name for name, value in numbers_kept(task.task) if kept.get(name) != value), None)
    if changed is not None:
        raise ConfigError(
            f"{task.where}: changes its own {changed!r} from call to call, which no checkpoint holds and which differs "
            "from worker to worker; make the task a function of model and batch, or move what it keeps into the model "
            "as a buffer"
        )
    return Found(task, written, rules, bool(drawn - {"torch"}), unused, task.reading, terms, evaluated, understood)


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
        raise ConfigError(
            f"{task.where}: its loss failed for {samples.num} samples, {describe(samples.batch)}: {in_one_line(error)}"
        ) from error
    count = float(found.terms)
    if not 0.0 <= count < math.inf:
        raise ConfigError(f"{task.where}: gives the count {count:g}; a count is what a mean divides by: 0 or more")
    return found


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
    if all(p.grad is None for p in model.parameters()):
        raise ConfigError(f"{task.where}: the loss doesn't depend on the model's parameters")
    trained = {id(p) for p in model.parameters()}
    for name, parameter in _parameters_of(task.task):
        if parameter.grad is not None and id(parameter) not in trained:
            raise ConfigError(
                f"{task.where}: a gradient reaches its own parameter {name!r}, which no optimizer trains and no "
                "checkpoint holds; move the parameter into the model, or, if it is to stay as it is (a teacher), call "
                "requires_grad_(False) on it or use it under torch.no_grad()"
            )


def _parameters_of(task: Any) -> Iterator[tuple[str, nn.Parameter]]:
    for name, value in vars(task).items() if hasattr(task, "__dict__") else ():
        if isinstance(value, nn.Parameter):
            yield name, value
        elif isinstance(value, nn.Module):
            for inner, parameter in value.named_parameters():
                yield f"{name}.{inner}", parameter


def _check_repeats(
    config: RunConfig, task: OwnTask, model: nn.Module, samples: _Samples, first: MicroBatchLoss
) -> None:
    with own_generators(seed=0), torch.no_grad():
        again = _loss(task, model, samples)
    if config.reduction == "exact" and not _same(first.total, again.total):
        raise ConfigError(
            f"{task.where}: gives {float(first.total):.9g} and then {float(again.total):.9g} for the same samples, weights "
            "and seeds: model or task keep something else, which no checkpoint holds and no other worker has; make "
            "it a buffer of the model (register_buffer), or use reduction=fast, which doesn't promise equal bits"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.detach().nan_to_num(), other.detach().nan_to_num())


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


def _meaning(task: OwnTask, model: nn.Module, samples: _Samples, *, whole: bool) -> tuple[OwnTask, float, str]:
    """(the task with its reading, loss terms a sample, what was understood): whether the numbers add up over parts."""
    n = samples.num
    with _steady(model), torch.no_grad(), own_generators(seed=0) as drew:
        raw = task.raw_loss(model, samples.batch)
        found = _loss(task, model, samples)
        chance = bool(drew())
    value = raw["loss"] if isinstance(raw, dict) and "loss" in raw else raw
    bare = isinstance(value, Tensor) and (value.dim() == 0 or (value.numel() == 1 and n > 1))
    if bare:
        task = replace(task, reading=Reading.SAMPLES)
    if not (chance or whole or n < 2):
        task = _added_up(task, model, samples, found, bare=bare)
    if task.reading is Reading.TOTAL:
        return task, 1.0, "a sum over the samples of a batch"
    terms = float(found.terms) / n
    if bare:
        sure = "" if not chance else " (not checked: the loss draws random numbers)"
        return task, 1.0, f"a mean over samples{sure}"
    if isinstance(value, Tensor):
        return task, 1.0, "one loss a sample"
    return task, terms or 1.0, f"a total and a count, {terms:.4g} a sample here"


def _added_up(task: OwnTask, model: nn.Module, samples: _Samples, found: MicroBatchLoss, *, bare: bool) -> OwnTask:
    """The task, with the reading under which the losses of parts add up to that of the whole. Raises ConfigError."""
    n = samples.num
    for part in (samples.part, samples.collated):
        fits = True
        for cut in sorted({n // 2, 1}):
            pieces = [_Samples(part(a, b), b - a, part, part) for a, b in ((0, cut), (cut, n))]
            with _steady(model), torch.no_grad(), own_generators(seed=0):
                losses = [_loss(task, model, piece) for piece in pieces]
            total, terms = sum(float(x.total) for x in losses), sum(float(x.terms) for x in losses)
            if not all(map(math.isfinite, (float(found.total), total))):
                continue
            if bare and _close(
                float(found.total) / n, sum(float(x.total) / p.num for x, p in zip(losses, pieces, strict=True))
            ):
                if not _close(float(found.total), total):
                    return replace(task, reading=Reading.TOTAL)
            fits = fits and _close(float(found.total), total) and _close(float(found.terms), terms)
        if fits:
            return task
    if bare:
        raise ConfigError(
            f"{task.where}: its number for a batch is neither the mean nor the sum over the batch's samples: {n} samples "
            f"give {float(found.total) / n:.6g}, their parts {', '.join(f'{float(x.total) / p.num:.6g}' for x, p in zip(losses, pieces, strict=True))}; "
            f"give descent.Mean(total, count) with the count that the mean divides by (labels that are not ignored, pixels, "
            f"tokens); {WAYS_OUT}"
        )
    raise ConfigError(
        f"{task.where}: its (total, count) don't add up: {n} samples give ({float(found.total):.6g}, {float(found.terms):.6g}), "
        f"their parts together ({total:.6g}, {terms:.6g}); {WAYS_OUT}"
    )


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= _CLOSE * max(abs(a), abs(b)) + 1e-6


def _evaluation(task: OwnTask, model: nn.Module, samples: _Samples) -> tuple[str, ...]:
    """The names of the means that an evaluation gives; its first call is made here. Raises ConfigError."""
    model.eval()
    try:
        with torch.no_grad(), own_generators(seed=0):
            results = task.evaluate(model, samples.batch, samples.num)
    except DescentError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:
        raise ConfigError(
            f"{task.where}: its evaluation failed for {samples.num} samples, {describe(samples.batch)}: "
            f"{in_one_line(error)}"
        ) from error
    finally:
        model.train()
    return tuple(name for name, result in results.items() if isinstance(result, Mean))
