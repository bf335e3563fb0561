"""What is told of a step: its loss and learning rate always; norms by layer and speeds every so often."""

import time

from torch import nn

from descent.training.control import REPLACED
from descent.training.input.feed import Feed
from descent.training.step import StepResult, layer_norms


class StepMetrics:
    """The metrics of one step after the other; speeds are means since they were last told."""

    def __init__(self, model: nn.Module, feed: Feed, *, batch_size: int, every: int) -> None:
        """every: steps between two that are told in detail, from `diagnostics.every`."""
        self._feed = feed
        # A layer is the module that owns the parameters.
        self._layers = [(n.rpartition(".")[0] or n, p) for n, p in model.named_parameters()]
        self._batch_size, self._every = batch_size, every
        self._window = (time.perf_counter(), 0)

    def of(self, step: int, result: StepResult, learning_rate: float) -> dict[str, float]:
        """Metric -> value of the step that has just been taken, or skipped."""
        metrics = {
            "train/loss": result.loss,
            "train/learning_rate": learning_rate,
            "grad/norm": result.gradient_norm,
        }
        if result.votes[REPLACED]:
            metrics["data/replaced"] = float(result.votes[REPLACED])
        if not result.committed:
            metrics["train/skipped"] = 1.0
        if step % self._every == 0 or step == 1:
            for layer, norm in layer_norms(self._layers).items():
                metrics[f"grad/norm/{layer}"] = norm
            now = time.perf_counter()
            then, at = self._window
            if step > at > 0:
                metrics["perf/samples_per_second"] = (step - at) * self._batch_size / (now - then)
                metrics["perf/data_wait"] = self._feed.waited_s() / (now - then)
            self._window = (now, step)
        return metrics
