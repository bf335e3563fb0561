"""The metrics of `metrics.NAME`: torchmetrics' own, updated chunk by chunk and computed once for the whole set.

A metric keeps states. Those of a chunk come from a metric that has seen nothing else; they are reduced over
the chunks as each state says (added up, put one behind the other, the largest, the smallest); and a metric that
is given the reduced states computes the figure. So a figure is that of the whole set, never a mean of means.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from descent.config import RunConfig, build, resolve_target
from descent.config.build import in_one_line
from descent.errors import ConfigError, TrainingError
from descent.training.results import Predictions

PREFIX = "metrics/"
"""Begins the keys of the metrics' states among those of an evaluation."""


class MetricSet:
    """The metrics of a run, by name."""

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        """metrics: by name, each with torchmetrics' `update`, `compute`, `reset` and the states that `add_state` made."""
        self.metrics = dict(metrics)

    @classmethod
    def of(cls, config: RunConfig, num_outputs: int | None) -> "MetricSet":
        """Build the metrics of the config; a `num_classes` that is left open is the data's. Raises ConfigError."""
        metrics = {}
        for name, spec in config.metrics.items():
            where = f"metrics.{name}"
            metric = build(_filled(spec, config, num_outputs, where), config.trusted_modules, where)
            if not all(hasattr(metric, part) for part in ("update", "compute", "reset", "_defaults", "_reductions")):
                raise ConfigError(
                    f"{where}._target_={spec['_target_']}: gives a {type(metric).__name__}, not a torchmetrics.Metric"
                )
            for state, reduce in metric._reductions.items():
                if _kind(metric, state, reduce) is None:
                    raise ConfigError(
                        f"{where}._target_={spec['_target_']}: its state {state!r} is put together by "
                        f"{getattr(reduce, '__name__', reduce)}, so the parts of a set don't give the number of the whole; give "
                        "what it needs as descent.Sum or Rows from a task's evaluate, and compute the figure in its compute"
                    )
            metrics[name] = metric
        return cls(metrics)

    def to(self, device: torch.device) -> "MetricSet":
        """These metrics with their states on the device."""
        return MetricSet({name: m.to(device) if isinstance(m, nn.Module) else m for name, m in self.metrics.items()})

    def states(self, predictions: Predictions | None, where: str) -> dict[str, tuple[str, Tensor]]:
        """{key: (kind, tensor)} of each state after one chunk. Raises TrainingError where there is nothing to compare."""
        if not self.metrics:
            return {}
        if predictions is None:
            raise TrainingError(
                f"{where}: metrics.{next(iter(self.metrics))} needs predictions, and the task's evaluate gives none; let it "
                'return "predictions": descent.Predictions(preds, target)'
            )
        found: dict[str, tuple[str, Tensor]] = {}
        preds, target = (_wide(value) for value in (predictions.preds, predictions.target))
        for name, metric in self.metrics.items():
            metric.reset()
            try:
                metric.update(preds, _as_labels(target) if _wants_labels(metric) else target)
            except Exception as error:
                raise TrainingError(f"metrics.{name}: can't compare these predictions: {in_one_line(error)}") from error
            for state, reduce in metric._reductions.items():
                kind = _kind(metric, state, reduce)
                assert kind is not None
                found[f"{PREFIX}{name}/{state}"] = (kind, _as_tensor(getattr(metric, state), kind))
        return found

    def compute(self, reduced: Mapping[str, Tensor]) -> dict[str, float]:
        """The figures of the whole set. Raises TrainingError for a metric that gives no numbers."""
        figures: dict[str, float] = {}
        for name, metric in self.metrics.items():
            metric.reset()
            for state in metric._reductions:
                value = reduced[f"{PREFIX}{name}/{state}"]
                default = metric._defaults[state]
                setattr(
                    metric, state, [value] if isinstance(default, list) else value.to(default.dtype).to(metric.device)
                )
            metric._update_count = 1  # states that were put in count as an update
            try:
                value = metric.compute()
            except Exception as error:
                raise TrainingError(f"metrics.{name}: failed for the whole set: {in_one_line(error)}") from error
            figures |= dict(_flat(name, value))
        return figures


def _filled(spec: Mapping[str, Any], config: RunConfig, num_outputs: int | None, where: str) -> dict[str, Any]:
    """The spec with the data's number of classes (or labels) where the metric needs it and the config leaves it open."""
    filled = dict(spec)
    target = resolve_target(spec["_target_"], config.trusted_modules, f"{where}._target_")
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return filled
    for key in ("num_classes", "num_labels"):
        if num_outputs is not None and key in parameters and filled.get(key) is None:
            filled[key] = num_outputs
    return filled


def _kind(metric: Any, state: str, reduce: Any) -> str | None:
    """How the parts of a state are combined; None where parts don't give the whole."""
    if isinstance(metric._defaults[state], list):
        return "rows"
    if reduce is None:
        return "rows"  # one row a part, as torchmetrics stacks the states of several processes
    return {"dim_zero_sum": "sum", "dim_zero_max": "max", "dim_zero_min": "min", "dim_zero_cat": "rows"}.get(
        getattr(reduce, "__name__", "")
    )


def _as_tensor(value: Any, kind: str) -> Tensor:
    if isinstance(value, list):
        rows = [v if v.dim() else v[None] for v in value]
        return torch.cat(rows).detach() if rows else torch.zeros(0)
    tensor: Tensor = value.detach()
    return tensor[None] if kind == "rows" else tensor


def _wants_labels(metric: Any) -> bool:
    """Whether the metric compares classes, which it takes as whole numbers."""
    return type(metric).__module__.startswith("torchmetrics.classification.")


def _as_labels(target: Any) -> Any:
    """Labels that a loss takes as 0.0 and 1.0 as whole numbers; probabilities as they are."""
    if isinstance(target, Tensor) and target.is_floating_point() and torch.equal(target, target.round()):
        return target.long()
    return target


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value


def _flat(name: str, value: Any) -> list[tuple[str, float]]:
    """(name, number) of each number that a metric gives."""
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _flat(f"{name}/{key}", item)]
    if isinstance(value, Tensor) and value.dim() == 1 and 1 < len(value) <= 1000:
        return [(f"{name}/{index}", float(item)) for index, item in enumerate(value)]
    if isinstance(value, Tensor) and value.numel() == 1:
        return [(name, float(value))]
    if isinstance(value, int | float):
        return [(name, float(value))]
    kind = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise TrainingError(
        f"metrics.{name}: gives {kind}, not a number; log such results from a task's evaluate and an observer"
    )
