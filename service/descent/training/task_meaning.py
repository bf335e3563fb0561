"""What the numbers of a user's loss mean: found out on a few samples and on their parts, before any worker exists."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from descent.config import RunConfig
from descent.config.build import in_one_line
from descent.data.base import Data
from descent.data.batch import Batch, describe, num_rows, rows, tensors_of
from descent.data.generators import own_generators
from descent.errors import ConfigError, DescentError, TrainingError
from descent.training.carried import STATELESS, asks_for_state
from descent.training.coupling import features_of
from descent.training.determinism import refuse_undeterministic
from descent.training.model_loss import IGNORED, labels_of, with_labels
from descent.training.objective import Reading
from descent.training.preflight import read
from descent.training.results import MicroBatchLoss
from descent.training.task import OwnTask

_CLOSE = 3e-5
"""Relative difference that rounding in float32 explains."""
WAYS_OUT = (
    "if the loss compares the samples of a batch with each other, give the task the two methods features(model, batch), "
    "one row a sample, and couple(features), the loss of the whole batch; or compute each batch whole, with slots=1 "
    "and batch.micro_size=auto"
)


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


class Samples(NamedTuple):
    """A batch and how to get parts of it."""

    batch: Batch
    num: int
    part: Callable[[int, int], Batch]
    """The samples first … stop-1 as a batch, cut out of the whole."""
    collated: Callable[[int, int], Batch]
    """The same samples, collated anew."""
    steady: Callable[[nn.Module], contextlib.AbstractContextManager[None]] = _steady
    """The mode of the model in which numbers are compared."""


def few_of(samples: Samples, first: int, stop: int) -> Samples:
    """Some of these samples."""
    batch = samples.part(first, stop)
    return Samples(batch, stop - first, lambda a, b: rows(batch, a, b), lambda a, b: rows(batch, a, b))


def samples_of(config: RunConfig, data: Data, count: int, *, spread: bool = False) -> Samples:
    """Some training samples as one batch: the first ones, or `spread` over the data set. Raises DataError."""
    chosen = np.linspace(0, len(data) - 1, count).astype(np.int64) if spread else np.arange(count)
    with own_generators(seed=0):
        batch = read(config, data, chosen, "data.train")

    def collated(first: int, stop: int) -> Batch:
        with own_generators(seed=0):
            return read(config, data, chosen[first:stop], "data.train")

    cut = num_rows(batch) == count
    return Samples(batch, count, (lambda a, b: rows(batch, a, b)) if cut else collated, collated)


def loss_of(task: OwnTask, model: nn.Module, samples: Samples) -> MicroBatchLoss:
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


def meaning_of(task: OwnTask, model: nn.Module, samples: Samples, *, whole: bool) -> tuple[OwnTask, float, str]:
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
        counted = loss_of(task, model, samples) if task.reading is not Reading.TOTAL else None
        terms = 1.0 if counted is None else float(counted.terms) / n or 1.0
        return task, terms, _IN_WORDS[task.reading] + unchecked
    found = _parts(task, model, samples, samples.part, n // 2)
    if comparable and not found.adds_up and not _parts(task, model, samples, samples.collated, n // 2).adds_up:
        raise ConfigError(f"{task.where}: its (total, count) don't add up: {n} samples give {found}; {WAYS_OUT}")
    if isinstance(value, Tensor):
        return task, 1.0, "one loss a sample"
    terms = float(loss_of(task, model, samples).terms) / n
    return task, terms or 1.0, f"a total and a count, {terms:.4g} a sample at first{unchecked}"


def _check_features(task: OwnTask, model: nn.Module, samples: Samples) -> None:
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


def _parts(task: OwnTask, model: nn.Module, samples: Samples, part: Callable[[int, int], Batch], cut: int) -> _Parts:
    def numbers(batch: Batch, num: int) -> tuple[float, float]:
        with samples.steady(model), torch.no_grad(), own_generators(seed=0):
            found = loss_of(task, model, samples._replace(batch=batch, num=num))
        return float(found.total), float(found.terms)

    pieces = [numbers(part(a, b), b - a) for a, b in ((0, cut), (cut, samples.num))]
    added = (sum(p[0] for p in pieces), sum(p[1] for p in pieces))
    return _Parts(numbers(samples.batch, samples.num), added, sum(abs(p[0]) for p in pieces))


def _bare(task: OwnTask, model: nn.Module, samples: Samples) -> OwnTask:
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


def _fitting(task: OwnTask, model: nn.Module, samples: Samples, readings: list[Reading]) -> list[Reading]:
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
