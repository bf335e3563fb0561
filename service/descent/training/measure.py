"""What an evaluation measures: the task's results and the metrics of the config."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from descent.data.batch import Batch
from descent.errors import DataError, TrainingError
from descent.training.evaluation_results import State, as_figures, states_of
from descent.training.metric_states import PREFIX, MetricSet
from descent.training.results import Predictions
from descent.training.task import Task


class Measure:
    """What an evaluation measures: the task's results and the metrics of the config, as parts and as figures."""

    def __init__(self, task: Task, metrics: MetricSet, states: Sequence[State] = (), *, sums_up: bool = False) -> None:
        """states: what each part consists of, found out before the run. sums_up: whether the loss is a sum, divided by
        nothing."""
        self._task, self._metrics, self.states, self._sums_up = task, metrics, tuple(states), sums_up
        self.where = getattr(task, "where", "the evaluation")

    def part(self, model: nn.Module, batch: Batch, num_samples: int) -> dict[str, tuple[str, Tensor]]:
        """What some samples give: {key: (kind, tensor)}. The model is in evaluation mode."""
        results = self._task.evaluate(model, batch, num_samples)
        found = [result for result in results.values() if isinstance(result, Predictions)]
        if len(found) > 1:
            raise TrainingError(f"{self.where}: its evaluation gives several Predictions; the metrics take one")
        return {**states_of(results), **self._metrics.states(found[0] if found else None, self.where)}

    def figures(self, reduced: Mapping[str, Tensor], states: Sequence[State]) -> dict[str, float]:
        """The figures of a whole set, by name. Raises DataError where nothing counts for the loss, TrainingError for odd
        figures."""
        own = [state for state in states if not state.key.startswith(PREFIX)]
        if "loss" in reduced and not float(reduced["loss"][1]) and not self._sums_up:
            raise DataError(
                "data.evaluate: nothing in it counts for the loss (every label is ignored, or its class weighs 0), so "
                "there is nothing to evaluate; mend the labels, or set data.holdout=0 to train without evaluation"
            )
        figures = self._task.compute(as_figures(reduced, own, self.where))
        for name, value in self._metrics.compute(reduced).items():
            if name in figures:
                raise TrainingError(
                    f"metrics.{name}: {self.where} gives a figure {name!r} too; give the metric another name"
                )
            figures[name] = value
        return figures
