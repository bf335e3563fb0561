"""Loss and accuracy on the held-out set, shared by all ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from service.training.collectives import Group
from service.training.feed import Feed
from service.training.objective import Objective
from service.training.state import TrainState


def evaluate(
    state: TrainState, objective: Objective, feed: Feed, group: Group, *, num_samples: int, size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:  # fmt: skip
    """{"eval/loss", and "eval/accuracy" where there are classes}, the same on every rank.

    The set is cut into chunks of `size` that don't depend on the number of ranks; each
    chunk's sums have one owner, so the result's bits are the same for any world size.
    """
    starts = range(0, num_samples, size)
    sums = torch.zeros(len(starts), 3, dtype=torch.float64, device=group.device)
    state.model.eval()
    with state.averaged(), torch.no_grad(), autocast():
        for chunk in range(group.rank, len(starts), group.world_size):
            stop = min(starts[chunk] + size, num_samples)
            inputs, targets = feed.take(np.arange(starts[chunk], stop, dtype=np.int64))
            output = state.model(inputs)
            sums[chunk, 0] = objective(output, targets)
            sums[chunk, 1] = objective.count(targets)
            if objective.by_class and not targets.is_floating_point():
                sums[chunk, 2] = objective.num_correct(output, targets)
    state.model.train()
    rows = group.sum_(sums).tolist()
    count = sum(row[1] for row in rows)
    metrics = {"eval/loss": sum(row[0] for row in rows) / count}
    if objective.by_class:
        metrics["eval/accuracy"] = sum(row[2] for row in rows) / count
    return metrics
