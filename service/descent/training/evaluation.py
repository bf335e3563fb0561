"""Evaluation on the held-out set: when it is due, loss and accuracy shared by all ranks, whether they are the best."""

from collections.abc import Sequence

import numpy as np
import torch

from descent.config import RunConfig
from descent.data.base import Data
from descent.errors import DataError
from descent.optim.plateau import Plateau
from descent.training.collectives import Group
from descent.training.determinism import begin_stream
from descent.training.input.feed import Feed
from descent.training.input.sampling import stream_seed
from descent.training.objective import Reading
from descent.training.plan import Plan
from descent.training.results import Mean
from descent.training.state import TrainState
from descent.training.task import Task


class Evaluator:
    """Evaluates the state after a step, once, and compares it with the best so far; every rank comes to the same answers."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        data: Data | None,
        state: TrainState,
        task: Task,
        device: torch.device,
    ) -> None:
        """data: the held-out set; without one no evaluation is ever due."""
        self._config, self._plan, self._state = config, plan, state
        self._task = task
        self._num_samples = 0 if data is None else len(data)
        self._feed = None if data is None else Feed(data, None, device, seed=config.seed, on_error=config.data.on_error)
        self._scores: tuple[int, dict[str, float]] = (-1, {})
        self.improved = False
        """Whether the state is the best so far and has not been saved yet."""

    def is_due(self) -> bool:
        """Whether to evaluate after this step. Not where that was done before a fault interrupted the run."""
        step = self._state.step
        due = self._plan.is_due(self._config.evaluate.every, step)
        due = due or step in (0, self._plan.total_steps)
        return self._feed is not None and due and self._state.evaluated < step

    def evaluate(self, group: Group) -> dict[str, float]:
        """The metrics of the state as it is now; a plateau schedule takes the loss in. Raises PeerLost, DataError."""
        assert self._feed is not None
        metrics = evaluate(
            self._state,
            self._task,
            self._feed,
            group,
            names=self._plan.evaluated,
            num_samples=self._num_samples,
            size=self._config.evaluate.batch_size,
            seed=self._config.seed,
            uses_non_torch_rng=self._plan.uses_non_torch_rng,
            sums_up=self._plan.loss_reading == Reading.TOTAL,
        )
        if isinstance(self._state.schedule, Plateau) and self._state.step > 0:
            self._state.schedule.observe(metrics["eval/loss"])
        self._state.evaluated = self._state.step
        self._judge(metrics)
        return metrics

    def _judge(self, metrics: dict[str, float]) -> None:
        self._scores = (self._state.step, metrics)
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


def evaluate(
    state: TrainState,
    task: Task,
    feed: Feed,
    group: Group,
    *,
    names: Sequence[str],
    num_samples: int,
    size: int,
    seed: int,
    uses_non_torch_rng: bool,
    sums_up: bool,
) -> dict[str, float]:
    """{"eval/<name>": figure}, the same on every rank.

    names: those of the means that the task's evaluation gives. sums_up: whether the loss is a sum, divided by nothing.
    The set is cut into chunks of `size` that don't depend on the number of ranks; each chunk's sums have one
    owner, so the result's bits are the same for any world size. A model that draws random numbers in
    evaluation too has a random stream for each chunk, the same in every evaluation.

    Raises PeerLost, and DataError where nothing in the set counts for the loss.
    """
    starts = range(0, num_samples, size)
    sums = torch.zeros(len(starts), 2 * len(names), dtype=torch.float64, device=group.device)
    state.model.eval()
    with state.averaged(), torch.no_grad():
        for chunk in range(group.rank, len(starts), group.world_size):
            stop = min(starts[chunk] + size, num_samples)
            batch = feed.take(np.arange(starts[chunk], stop, dtype=np.int64))
            # No training step is step 0.
            begin_stream(stream_seed(seed, 0, chunk), group.device, uses_non_torch_rng)
            results = task.evaluate(state.model, batch, stop - starts[chunk])
            for index, name in enumerate(names):
                mean = results[name]
                assert isinstance(mean, Mean)
                sums[chunk, 2 * index], sums[chunk, 2 * index + 1] = mean.total, mean.count
    state.model.train()
    totals = list(map(sum, zip(*group.sum_(sums).tolist(), strict=True)))
    pairs = dict(zip(names, zip(totals[::2], totals[1::2], strict=True), strict=True))
    loss, count = pairs.pop("loss")
    if not count and not sums_up:
        raise DataError(
            "data.evaluate: nothing in it counts for the loss (every label is ignored, or its class weighs 0), so "
            "there is nothing to evaluate; mend the labels, or set data.holdout=0 to train without evaluation"
        )
    reduced = {"loss": loss / (count or 1.0)} | {n: total / count for n, (total, count) in pairs.items() if count}
    return {f"eval/{name}": value for name, value in task.compute(reduced).items()}
