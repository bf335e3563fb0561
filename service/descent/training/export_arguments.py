"""With which arguments a trained model is called: what its export is traced with, and later users call it with."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from descent.data.batch import Batch, describe
from descent.errors import TrainingError
from descent.training.task import OwnTask, Supervised

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a model's forward."""

_ANSWERS = ("target", "targets", "y", "start_positions", "end_positions", "num_items_in_batch")
"""Keys of a batch that hold what the model is to predict; so does any key with "label" in it."""


def export_arguments(task: Supervised | OwnTask, model: nn.Module, sample: Any) -> Arguments:
    """The arguments of `model.forward` for a sample of a run (`plan.Prepared.sample`).

    A task's own `export_args(batch)` decides: it gives one tensor, a tuple of arguments, a dict of keyword arguments, or
    a pair of both. Without it, of a batch that is a tuple the first elements are taken, as many as forward must have;
    of a dict all that forward takes but what is to be predicted.

    Raises TrainingError for an `export_args` that gives something else.
    """
    if isinstance(task, Supervised):
        return (sample,), {}
    own = task.functions.get("export_args")
    return arguments_of(model, sample) if own is None else _given(own(sample), task.where)


def _given(value: Any, where: str) -> Arguments:
    if isinstance(value, Tensor):
        return (value,), {}
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], Mapping):
        return value[0], dict(value[1])
    if isinstance(value, tuple):
        return value, {}
    if isinstance(value, Mapping):
        return (), {str(key): item for key, item in value.items()}
    raise TrainingError(
        f"{where}: export_args gives {describe(value)}; it may give a tensor, a tuple of arguments, a dict of keyword "
        "arguments, or a pair of both"
    )


def arguments_of(model: nn.Module, batch: Batch) -> Arguments:
    """The arguments for a batch of a form that says nothing of it itself; see `export_arguments`."""
    parameters = _parameters(model)
    required, most = _num_positional(parameters)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        named = dict(zip(batch._fields, batch, strict=True))
        batch = named if set(named) & set(parameters) else tuple(batch)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type | Mapping):
        batch = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    if isinstance(batch, Mapping):
        return _of_dict(parameters, batch)
    if isinstance(batch, tuple | list):
        first = batch[0] if batch else ()
        if required > 1 and isinstance(first, tuple | list) and len(first) in range(required, most + 1):
            return tuple(first), {}  # ((one, other), target)
        return tuple(batch[: max(1, required)]), {}
    return (batch,), {}


def _of_dict(parameters: Mapping[str, inspect.Parameter], batch: Mapping[Any, Any]) -> Arguments:
    kinds = {parameter.kind for parameter in parameters.values()}
    anything = inspect.Parameter.VAR_KEYWORD in kinds
    needed = {name for name, parameter in parameters.items() if _is_required(parameter)}
    taken = {str(key): value for key, value in batch.items() if anything or str(key) in parameters}
    kept = {key: value for key, value in taken.items() if key in needed or not is_answer(key)}
    return ((), kept) if needed <= kept.keys() and kept else ((batch,), {})


def is_answer(key: str) -> bool:
    """Whether a key of a batch holds what the model is to predict.

    >>> [is_answer(key) for key in ("labels", "input_ids", "y")]
    [True, False, True]
    """
    return "label" in key.lower() or key.lower() in _ANSWERS


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of forward; of a model that peft has wrapped, those of the model inside."""
    base = getattr(model, "get_base_model", None)
    inside = base() if callable(base) else model
    return inspect.signature(inside.forward).parameters


def _num_positional(parameters: Mapping[str, inspect.Parameter]) -> tuple[int, int]:
    """How many positional arguments forward must have, and how many it may have."""
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return sum(map(_is_required, positional)), len(positional)


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )
