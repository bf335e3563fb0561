"""The metrics of a step: loss and learning rate in every step; norms by layer and speeds every so many steps."""

import time

import torch
from torch import nn

from descent.training.control import REPLACED
from descent.training.input.feed import Feed
from descent.training.step import StepResult, layer_norms


class StepMetrics:
    """Makes the metrics of one step after the other; speeds are means since the last step that had them."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, feed: Feed, *, batch_size: int, every: int
    ) -> None:
        """every: the steps from one detailed record to the next, `diagnostics.every`."""
        self._feed = feed
        # A layer is the module that owns the parameters.
        self._layers = [(n.rpartition(".")[0] or n, p) for n, p in model.named_parameters()]
        self._batch_size, self._every = batch_size, every
        self._window = (time.perf_counter(), 0)
        self._detailed = False
        """Whether the step under way has a detailed record."""
        self._norms: dict[str, float] | None = None
        """The norms by layer of the step under way, once its update begins."""
        # Before the update, because optimizers of other packages compute in the gradients' own memory.
        optimizer.register_step_pre_hook(lambda *_: self._take_norms())

    def begin(self, step: int) -> None:
        """The step begins."""
        self._detailed, self._norms = step % self._every == 0 or step == 1, None

    def _take_norms(self) -> None:
        if self._detailed:
            self._norms = layer_norms(self._layers)

    def of(self, step: int, result: StepResult, learning_rate: float) -> dict[str, float]:
        """Metric -> value for the step that has just been committed or skipped."""
        metrics = {
            "train/loss": result.loss,
            "train/learning_rate": learning_rate,
        }
        if not result.overflowed:
            metrics["grad/norm"] = result.gradient_norm
        metrics |= {f"train/{name}": value for name, value in result.logged.items()}
        if result.votes[REPLACED]:
            metrics["data/replaced"] = float(result.votes[REPLACED])
        if not result.committed:
            metrics["train/skipped"] = 1.0
        if self._detailed:
            norms = self._norms
            if norms is None:  # there was no update
                norms = layer_norms([] if result.overflowed else self._layers)
            metrics |= {f"grad/norm/{layer}": norm for layer, norm in norms.items()}
            now = time.perf_counter()
            then, at = self._window
            if step > at > 0:
                metrics["perf/samples_per_second"] = (step - at) * self._batch_size / (now - then)
                metrics["perf/data_wait"] = self._feed.waited_s() / (now - then)
            self._window = (now, step)
        return metrics
