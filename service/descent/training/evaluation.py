"""Evaluation on the held-out set: when it is due, its figures shared by all ranks, whether they are the best."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from descent.config import RunConfig
from descent.data.base import Data
from descent.messages import Notice
from descent.optim.plateau import Plateau
from descent.training.collectives import Group
from descent.training.determinism import begin_stream
from descent.training.evaluation_results import reduce_parts
from descent.training.input.feed import Feed
from descent.training.input.sampling import stream_seed
from descent.training.measure import Measure
from descent.training.metric_states import MetricSet
from descent.training.objective import Reading
from descent.training.plan import Plan
from descent.training.state import TrainState
from descent.training.task import Task


class Evaluator:
    """Evaluates the state after a step, once, and compares it with the best so far; every rank comes to the same answers."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        data: Data | None,
        others: Mapping[str, Data],
        state: TrainState,
        task: Task,
        metrics: MetricSet,
        device: torch.device,
    ) -> None:
        """data: the held-out set; without one no evaluation is ever due. others: further sets, by name."""
        self._config, self._plan, self._state = config, plan, state
        self._measure = Measure(task, metrics, plan.evaluated, sums_up=plan.loss_reading == Reading.TOTAL)
        sets = {} if data is None else {"": data, **{f"{name}/": other for name, other in others.items()}}
        self._sets = {prefix: (len(given), feed_of(config, given, device)) for prefix, given in sets.items()}
        self._scores: tuple[int, dict[str, float]] = (-1, {})
        self.improved = False
        """Whether the state is the best so far and has not been saved yet."""

    def is_due(self) -> bool:
        """Whether to evaluate after this step. Not where that was done before a fault interrupted the run."""
        step = self._state.step
        due = self._plan.is_due(self._config.evaluate.every, step)
        due = due or step in (0, self._plan.total_steps)
        return bool(self._sets) and due and self._state.evaluated < step

    def evaluate(self, group: Group) -> dict[str, float]:
        """The metrics of the state as it is now; a plateau schedule takes the loss in. Raises PeerLost, DataError."""
        metrics: dict[str, float] = {}
        for prefix, (num_samples, feed) in self._sets.items():
            with self._state.averaged():
                figures = evaluate(
                    self._state.model,
                    self._measure,
                    feed,
                    group,
                    num_samples=num_samples,
                    size=self._config.evaluate.batch_size,
                    seed=self._config.seed,
                    uses_non_torch_rng=self._plan.uses_non_torch_rng,
                )
            metrics |= {f"eval/{prefix}{name}": value for name, value in figures.items()}
        schedule = self._state.schedule
        if isinstance(schedule, Plateau) and self._state.step > 0:
            schedule.observe(metrics[schedule.metric])
        self._state.evaluated = self._state.step
        self._judge(metrics)
        return metrics

    def stops(self) -> bool:
        """Whether the run ends here, because the evaluations have made no progress for long enough."""
        stop = self._config.stop
        return stop is not None and self._state.stop_waited >= stop.patience

    def _judge(self, metrics: dict[str, float]) -> None:
        self._scores = (self._state.step, metrics)
        stop = self._config.stop
        if stop is not None and self._state.step > 0:
            if stop.is_progress(metrics[stop.metric], self._state.stop_best):
                self._state.stop_best, self._state.stop_waited = metrics[stop.metric], 0
            else:
                self._state.stop_waited += 1
        keep = self._config.checkpoint.keep_best
        score = metrics.get(keep.metric) if keep is not None else None
        if keep is None or score is None or score != score or self._state.step == 0:
            return
        best = self._state.best
        if best is None or (score > best if keep.higher else score < best):
            self._state.best, self.improved = score, True

    def scores(self) -> dict[str, float]:
        """The metrics of the state as it is now, for its checkpoint; empty where the state was not evaluated."""
        evaluated, scores = self._scores
        return scores if evaluated == self._state.step else {}


def stopped_early(config: RunConfig, state: TrainState, generation: int) -> Notice:
    """Says that the run ends before its last step, and why."""
    assert config.stop is not None and state.stop_best is not None
    detail = (
        f"stop: {config.stop.metric} has made no progress in {state.stop_waited} evaluations; its best value is "
        f"{state.stop_best:.6g}, so the run ends here"
    )
    return Notice("stopped early", state.step, generation, None, detail)


def feed_of(config: RunConfig, data: Data, device: torch.device) -> Feed:
    """What reads an evaluation set."""
    return Feed(data, None, device, seed=config.seed, on_error=config.data.on_error)


def evaluate(
    model: nn.Module,
    measure: Measure,
    feed: Feed,
    group: Group,
    *,
    num_samples: int,
    size: int,
    seed: int,
    uses_non_torch_rng: bool,
) -> dict[str, float]:
    """The figures by name, the same on every rank.

    The set is cut into chunks of `size` that don't depend on the number of ranks; each chunk has one owner, so the
    result's bits are the same for any world size. A model that draws random numbers in evaluation too has a
    random stream for each chunk, the same in every evaluation.

    Raises PeerLost, DataError where nothing in the set counts for the loss, TrainingError for odd results.
    """
    starts = range(0, num_samples, size)

    def parts() -> Iterator[tuple[int, dict[str, tuple[str, Tensor]]]]:
        for chunk in range(group.rank, len(starts), group.world_size):
            stop = min(starts[chunk] + size, num_samples)
            batch = feed.take(np.arange(starts[chunk], stop, dtype=np.int64))
            # No training step is step 0.
            begin_stream(stream_seed(seed, 0, chunk), group.device, uses_non_torch_rng)
            yield chunk, measure.part(model, batch, stop - starts[chunk])

    model.eval()
    with torch.no_grad():
        reduced = reduce_parts(parts(), measure.states, len(starts), group, measure.where)
    model.train()
    return measure.figures(reduced, measure.states)
