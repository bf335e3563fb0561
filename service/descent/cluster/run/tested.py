"""The test set: evaluated once, at the end of a run, with its best weights; by the process that leads the run."""

import threading
from typing import TYPE_CHECKING

from descent.config import RunConfig
from descent.storage import Location

if TYPE_CHECKING:
    from descent.training.plan import Prepared


def test_figures(config: RunConfig, prepared: "Prepared", target: Location) -> dict[str, float]:
    """{"test/<name>": figure} of the checkpoint `target`; the prepared model gets its weights.

    Raises DescentError, and whatever the user's code raises.
    """
    import torch

    from descent.checkpoint.weights import put_checkpoint_into
    from descent.training.collectives import Group
    from descent.training.evaluation import evaluate, feed_of
    from descent.training.loss_parameters import load_trained
    from descent.training.measure import Measure
    from descent.training.metric_states import MetricSet
    from descent.training.objective import Reading

    assert prepared.test is not None
    put_checkpoint_into(prepared.model, target)
    load_trained(prepared.task, target)
    plan, cpu = prepared.plan, torch.device("cpu")
    measure = Measure(
        prepared.task,
        MetricSet.of(config, prepared.train.num_outputs),
        plan.evaluated,
        sums_up=plan.loss_reading == Reading.TOTAL,
    )
    figures = evaluate(
        prepared.model.to(cpu),
        measure,
        feed_of(config, prepared.test, cpu),
        Group(0, 1, cpu, threading.Event()),
        num_samples=len(prepared.test),
        size=config.evaluate.batch_size,
        seed=config.seed,
        uses_non_torch_rng=plan.uses_non_torch_rng,
    )
    return {f"test/{name}": value for name, value in figures.items()}
