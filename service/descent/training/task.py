"""What a training is: how a batch becomes a loss, and what is evaluated; in the form in which the step asks for it.

Two classes have this form. `Supervised` is a model and a loss from the config, for batches (inputs, targets).
`OwnTask` is the user's class, or function `loss(model, batch)`, for batches of any form.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from descent.config import RunConfig, build, resolve_target
from descent.data.base import Data
from descent.data.batch import Batch, describe, num_rows, rows, tensors_of
from descent.data.generators import own_generators
from descent.errors import ConfigError, TrainingError
from descent.training.model_loss import IGNORED, labels_of
from descent.training.objective import Objective, Reading
from descent.training.results import Mean, MicroBatchLoss, Predictions, Result, Rows, Sum

Autocast = Callable[[], AbstractContextManager[object]]
"""Gives the context in which the model computes: mixed precision, or nothing."""
_ALONE = 64
"""Samples of a micro-batch that are run one by one where nothing else tells the bad ones apart."""
_METHODS = ("collate", "evaluate", "compute", "export_args", "features", "couple")


class Task(Protocol):
    """How a batch becomes a loss, and what is evaluated."""

    @property
    def logged(self) -> tuple[str, ...]:
        """Names of the further means that each loss brings, in the order in which ranks exchange them."""
        ...

    def loss(self, model: nn.Module, batch: Batch, samples: range) -> MicroBatchLoss:
        """The loss of one micro-batch, as a sum and a count.

        samples: the places of the micro-batch's samples in the step's global batch.
        Raises TrainingError for a result that the first batch didn't have.
        """
        ...

    def evaluate(self, model: nn.Module, batch: Batch, num_samples: int) -> dict[str, Result]:
        """What is known of some evaluation samples: at least the loss, under "loss". The model is in evaluation mode."""
        ...

    def compute(self, reduced: Mapping[str, Any]) -> dict[str, float]:
        """The figures of a whole evaluation set: a mean is a float here, a sum and rows are tensors."""
        ...

    def bad_rows(self, model: nn.Module, batch: Batch, spoilt: Callable[[Tensor], bool], *, alone: bool) -> list[int]:
        """The rows of a micro-batch that make its loss or gradient not finite; empty where that can't be told.

        spoilt: whether the gradient of a loss isn't finite. alone: whether the model can be asked for one sample
        alone, without a change of its buffers.
        """
        ...

    def to(self, device: torch.device, autocast: Autocast) -> "Task":
        """This task on the device, with the context in which the model computes."""
        ...


@dataclass(frozen=True)
class Supervised:
    """Batches are pairs (inputs, targets); the loss compares the model's output with the targets."""

    objective: Objective
    autocast: Autocast = contextlib.nullcontext
    logged: tuple[str, ...] = ()

    def loss(self, model: nn.Module, batch: Batch, samples: range) -> MicroBatchLoss:  # noqa: ARG002
        inputs, targets = batch
        with self.autocast():
            output = model(inputs)
        return MicroBatchLoss(*self.objective(output, targets))

    def evaluate(self, model: nn.Module, batch: Batch, num_samples: int) -> dict[str, Result]:  # noqa: ARG002
        inputs, targets = batch
        with self.autocast():
            output = model(inputs)
            total, terms = self.objective(output, targets)
        if self.objective.is_regression:
            output, targets = self.objective.fitted(output, targets)
        results: dict[str, Result] = {"loss": Mean(total, terms)}
        if self.objective.by_class:
            correct, labels = self.objective.num_correct(output, targets), self.objective.num_labels(targets)
            results["accuracy"] = Mean(correct, labels)
        elif self.objective.is_regression and output.shape == targets.shape:
            results |= _regression(output, targets)
        return {**results, "predictions": Predictions(output, targets)}

    def compute(self, reduced: Mapping[str, Any]) -> dict[str, float]:
        figures = dict(reduced)
        if "r2" in figures:
            count, total, squares, errors = figures.pop("r2").double()
            spread = squares - total.square() / count
            # As scikit-learn's r2_score: the mean over the outputs; an output that is constant has none.
            shares = (1 - errors / spread)[spread > 1e-12 * squares]
            if len(shares):
                figures["r2"] = float(shares.mean())
        return figures

    def bad_rows(self, model: nn.Module, batch: Batch, spoilt: Callable[[Tensor], bool], *, alone: bool) -> list[int]:
        inputs, targets = batch
        with self.autocast():
            output = model(inputs)
        whole = spoilt(self.objective(output, targets).total)
        with torch.no_grad():
            found = set(not_finite_rows(output))
            for row in range(len(targets)):
                one = slice(row, row + 1)
                if not self.objective(output[one], targets[one]).total.isfinite():
                    found.add(row)
        if not found and whole and alone:  # only the backward is not finite
            for row in range(min(len(targets), _ALONE)):
                if spoilt(self.loss(model, rows(batch, row, row + 1), range(1)).total):
                    found.add(row)
        return sorted(found)

    def to(self, device: torch.device, autocast: Autocast) -> "Supervised":
        return replace(self, autocast=autocast, objective=self.objective.to(device))

    @property
    def collate(self) -> None:
        """None: samples are put together as torch does."""

    def within(self, data: Data) -> "Supervised":
        """This task for batches of `data`. Labels in memory are searched once for ignored ones, not in every step."""
        return replace(self, objective=self.objective.within(data))


def _regression(output: Tensor, targets: Tensor) -> dict[str, Result]:
    """The mean absolute error, and what R² is computed from: [4, outputs]."""
    wanted = targets.detach().double().reshape(len(targets), -1)
    errors = output.detach().double().reshape(len(targets), -1) - wanted
    count = torch.full_like(wanted[0], len(wanted))
    sums = torch.stack([count, wanted.sum(0), wanted.square().sum(0), errors.square().sum(0)])
    return {"mae": Mean(errors.abs().sum(), errors.numel()), "r2": Sum(sums)}


@dataclass(frozen=True)
class OwnTask:
    """A task of the user's: a class with a method `loss(model, batch)`, or a function of this form."""

    task: Any
    where: str
    """The key and the class, for messages."""
    reading: Reading | None = None
    """What a bare number of the loss means; None for a loss that says so itself."""
    names: tuple[str, ...] | None = None
    """Names of the further numbers beside the loss; None: not known yet."""
    autocast: Autocast = contextlib.nullcontext
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """The methods that the task has."""

    @classmethod
    def of(cls, task: Any, where: str) -> "OwnTask":
        """Raises ConfigError for what is no task."""
        loss = getattr(task, "loss", None) if not inspect.isfunction(task) else task
        if not callable(loss) and callable(task):
            loss = task
        coupled = callable(getattr(task, "couple", None))
        if not callable(loss) and not coupled and not hasattr(task, "phases"):
            raise ConfigError(
                f"{where}: is a {type(task).__name__} without a method loss(model, batch); a task is a class with such "
                "a method, or a function loss(model, batch)"
            )
        functions = {name: f for name in _METHODS if callable(f := getattr(task, name, None))}
        if callable(loss):
            functions["loss"] = loss
        if coupled and "features" not in functions:
            raise ConfigError(
                f"{where}: has a method couple(features), and no method features(model, batch) that gives what couple "
                "takes: one row a sample"
            )
        for name, count in (("loss", 2), ("evaluate", 2), ("compute", 1), ("features", 2), ("couple", 1)):
            check_arguments(functions.get(name), name, count, where)
        return cls(task, where, functions=functions)

    @property
    def logged(self) -> tuple[str, ...]:
        return self.names or ()

    @property
    def collate(self) -> Callable[[list[Any]], Batch] | None:
        """The task's own collate function, from a list of samples to a batch."""
        return self.functions.get("collate")

    def within(self, data: Data) -> "OwnTask":  # noqa: ARG002
        """This task for batches of `data`."""
        return self

    @property
    def couples(self) -> bool:
        """Whether the loss compares the samples of a batch with each other, by their features."""
        return "couple" in self.functions

    def raw_loss(self, model: nn.Module, batch: Batch) -> Any:
        """What the user's `loss` returns, as it is; of a task that couples, the loss of these samples alone."""
        with self.autocast():
            if self.couples:
                return self.functions["couple"](self.functions["features"](model, batch))
            return self.functions["loss"](model, batch)

    def coupled(self, features: Batch, num_samples: int) -> MicroBatchLoss:
        """The loss of a whole batch, from the features of all of its samples. Raises TrainingError."""
        value = self.functions["couple"](features)
        return loss_sum(value, None, num_samples, self.reading, self.names, self.where)

    def loss(self, model: nn.Module, batch: Batch, samples: range) -> MicroBatchLoss:
        value = self.raw_loss(model, batch)
        return loss_sum(value, batch, len(samples), self.reading, self.names, self.where)

    def evaluate(self, model: nn.Module, batch: Batch, num_samples: int) -> dict[str, Result]:
        results: dict[str, Result] = {}
        if "evaluate" in self.functions:
            with self.autocast():
                value = self.functions["evaluate"](model, batch)
            results = evaluation_results(value, num_samples, self.where)
            if "loss" in results and not isinstance(value["loss"], Mean):
                total, terms, *_ = loss_sum(value["loss"], batch, num_samples, self.reading, (), self.where)
                results["loss"] = Mean(total, terms)
        if "loss" not in results:
            total, terms, logged, _ = self.loss(model, batch, range(num_samples))
            results = {"loss": Mean(total, terms), **logged, **results}
        return results

    def compute(self, reduced: Mapping[str, Any]) -> dict[str, float]:
        figures = {name: value for name, value in reduced.items() if isinstance(value, float)}
        if "compute" not in self.functions:
            return figures
        given = self.functions["compute"](dict(reduced))
        if not isinstance(given, Mapping):
            raise TrainingError(f"{self.where}: compute gives a {type(given).__name__}; it must be a dict of numbers")
        return {
            **figures,
            **{str(name): _as_float(value, f"{self.where}: compute", name) for name, value in given.items()},
        }

    def bad_rows(self, model: nn.Module, batch: Batch, spoilt: Callable[[Tensor], bool], *, alone: bool) -> list[int]:
        count = num_rows(batch)
        if count is None or not alone:
            return []
        found = []
        for row in range(min(count, _ALONE)):
            try:
                total = self.loss(model, rows(batch, row, row + 1), range(1)).total
            except Exception:  # a task that can't take one sample tells nothing about single samples
                return []
            if not total.isfinite() or spoilt(total):
                found.append(row)
        return found

    def to(self, device: torch.device, autocast: Autocast) -> "OwnTask":
        for name, value in vars(self.task).items() if hasattr(self.task, "__dict__") else ():
            if isinstance(value, nn.Parameter):
                value.data = value.data.to(device)  # the same parameter, which the optimizer knows
            elif isinstance(value, nn.Module | Tensor):
                setattr(self.task, name, value.to(device))
        if isinstance(self.task, nn.Module):
            self.task.to(device)
        return replace(self, autocast=autocast)


def build_task(config: RunConfig) -> OwnTask | None:
    """The config's own task; None for today's default, a model and a loss.

    Modules that the task holds (a teacher) are frozen and in evaluation mode from then on: they are no part of
    what is trained. Raises ConfigError.
    """
    if config.task is None:
        return None
    where = f"task._target_={config.task['_target_']}"
    with own_generators(seed=config.seed):
        task = _build(config)
    for value in vars(task).values() if hasattr(task, "__dict__") else ():
        if isinstance(value, nn.Module):
            value.eval()
    for module in task.children() if isinstance(task, nn.Module) else ():
        module.eval()
    return OwnTask.of(task, where)


def _build(config: RunConfig) -> Any:
    spec = config.task
    assert spec is not None
    target = resolve_target(spec["_target_"], config.trusted_modules, "task._target_")
    if not inspect.isclass(target) and _num_required(target) >= 2:  # loss(model, batch) itself, not a factory
        arguments = {key: value for key, value in spec.items() if key != "_target_"}
        return partial(target, **arguments) if arguments else target
    if inspect.isfunction(target) and _num_required(target) == 1 and len(spec) == 1:
        raise ConfigError(
            f"task._target_={spec['_target_']}: takes {inspect.signature(target)}; it must take (model, batch)"
        )
    return build(spec, config.trusted_modules, "task")


def _num_required(function: Callable[..., Any]) -> int:
    """How many positional arguments a function insists on."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 0
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


def check_arguments(function: Callable[..., Any] | None, name: str, count: int, where: str) -> None:
    """Raise ConfigError unless the function takes `count` positional arguments."""
    if function is None:
        return
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError as error:
        wanted = {"compute": "(reduced)", "couple": "(features)"}.get(name, "(model, batch)")
        raise ConfigError(f"{where}: {name} must take {wanted}: {error}") from error
    except ValueError:  # a signature that Python can't read
        return


WHAT_A_LOSS_MAY_BE = (
    "loss(model, batch) may give descent.Mean(total, count), a tuple (total, count), one loss a sample [n], the mean "
    "over the samples (a 0-d tensor), or a dict of these with the key 'loss'"
)


def loss_sum(
    value: Any, batch: Batch, num_samples: int, reading: Reading | None, logged: tuple[str, ...] | None, where: str
) -> MicroBatchLoss:
    """What a user's loss gives, as sum and count.

    reading: what a bare number means; None takes it for a mean over samples. logged: the names of the further
    numbers; None takes what comes. Raises TrainingError for anything else.
    """
    if isinstance(value, Mapping):
        if "loss" not in value:
            raise TrainingError(f"{where}: gives {describe(value)} without the key 'loss'; {WHAT_A_LOSS_MAY_BE}")
        others = {str(name): _logged(item, num_samples, name, where) for name, item in value.items() if name != "loss"}
        if logged is not None and set(others) != set(logged):
            raise TrainingError(
                f"{where}: gives the numbers {sorted(others)}, and gave {sorted(logged)} for the first batch; give the "
                "same names for every batch (Mean(0.0, 0) where there is nothing to say)"
            )
        return loss_sum(value["loss"], batch, num_samples, reading, (), where)._replace(logged=others)
    if logged:
        raise TrainingError(f"{where}: gives no {sorted(logged)}, as for the first batch")
    if isinstance(value, Mean):
        value = (value.total, value.count)
    if isinstance(value, tuple) and len(value) == 2 and _is_number(value[0]) and _is_number(value[1]):
        total, count = value
        if not isinstance(total, Tensor):
            raise TrainingError(f"{where}: its total is the number {total}, without a gradient; give the 0-d tensor")
        return MicroBatchLoss(_wide(total.squeeze()), count.detach() if isinstance(count, Tensor) else count)
    if isinstance(value, Tensor) and value.is_floating_point():
        if value.numel() == 1 and (value.dim() == 0 or num_samples != 1):
            number = _wide(value.squeeze())
            if reading is Reading.TOTAL:
                return MicroBatchLoss(number, 0)
            count = _counted(batch, num_samples, reading)
            # A mean over no labels at all is nan; nothing is learned from it.
            return MicroBatchLoss(number * count if count else number.nan_to_num() * 0.0, count)
        if value.dim() == 1 and len(value) == num_samples:
            return MicroBatchLoss(_wide(value).sum(), num_samples)
    raise TrainingError(f"{where}: gives {describe(value)} for {num_samples} samples; {WHAT_A_LOSS_MAY_BE}")


def _counted(batch: Batch, num_samples: int, reading: Reading | None) -> int:
    """What a mean over a batch divides by."""
    if reading not in (Reading.LABELS, Reading.NEXT_LABELS):
        return num_samples
    labels = labels_of(batch)
    assert labels is not None
    return int(((labels[:, 1:] if reading is Reading.NEXT_LABELS else labels) != IGNORED).sum())


def _wide(total: Tensor) -> Tensor:
    return total.float() if total.dtype in (torch.float16, torch.bfloat16) else total


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) and not isinstance(value, bool)


def _logged(value: Any, num_samples: int, name: object, where: str) -> Mean:
    """A further number beside the loss, as a mean: one that says nothing of its count is a mean over samples."""
    if isinstance(value, Mean):
        return Mean(value.total.detach() if isinstance(value.total, Tensor) else value.total, value.count)
    if isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value)):
        return _logged(Mean(*value), num_samples, name, where)
    if isinstance(value, Tensor) and value.dim() == 1 and len(value) == num_samples != 1:
        return Mean(value.detach().float().sum(), num_samples)
    if _is_number(value):
        number = value.detach().float().squeeze() if isinstance(value, Tensor) else float(value)
        return Mean(number * num_samples, num_samples)
    raise TrainingError(
        f"{where}: gives {describe(value)} as {name!r}, which is logged beside the loss; give descent.Mean(total, count) "
        "or one number"
    )


def evaluation_results(value: Any, num_samples: int, where: str) -> dict[str, Result]:
    """What a user's `evaluate` gives, by name; a bare number is a mean over the samples. Raises TrainingError."""
    if not isinstance(value, Mapping):
        raise TrainingError(
            f"{where}: evaluate gives {describe(value)}; it must be a dict of descent.Mean, Sum, Rows and Predictions by name"
        )
    results: dict[str, Result] = {}
    for name, item in value.items():
        if not isinstance(name, str):
            raise TrainingError(f"{where}: evaluate gives a result under {name!r}; its names must be texts")
        if isinstance(item, Sum | Rows | Predictions):
            results[name] = item
        elif isinstance(item, Tensor) and item.dim() == 1 and len(item) == num_samples != 1:
            results[name] = Mean(item.float().sum(), num_samples)
        else:
            results[name] = _logged(item, num_samples, name, f"{where}: evaluate")
    return results


def _as_float(value: Any, where: str, name: object) -> float:
    if not _is_number(value):
        raise TrainingError(f"{where} gives {describe(value)} as {name!r}; it must be one number")
    return float(value)


def not_finite_rows(batch: Batch) -> list[int]:
    """The rows of a batch that hold something that is not finite; empty where the batch has no rows."""
    count = num_rows(batch)
    if not count:
        return []
    bad = torch.zeros(count, dtype=torch.bool)
    for _, tensor in tensors_of(batch):
        if tensor.is_floating_point() or tensor.is_complex():
            bad |= ~tensor.detach().reshape(count, -1).isfinite().all(1).cpu()
    return bad.nonzero().flatten().tolist()
