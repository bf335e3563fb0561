"""Checks of a config that need no data, no device and no workers: `descent config` makes them."""

import sys

import torch
from torch import nn

from descent.config import RunConfig, WorkerRange, build, check_arguments
from descent.training.objective import Objective
from descent.training.plan import build_optimizer_for, build_schedule, share_out


def check_config(config: RunConfig) -> None:
    """Build what can be built without data (loss, optimizer, schedule) and check how the batch is shared out.

    Of model and data sets only the class and the names of the arguments are checked.

    Raises ConfigError for what a run with this config would refuse before its start.
    """
    trusted = config.trusted_modules
    check_arguments(config.model, trusted, "model")
    check_arguments(config.data.train, trusted, "data.train")
    if config.data.evaluate is not None:
        check_arguments(config.data.evaluate, trusted, "data.evaluate")
    if config.task is not None:
        check_arguments(config.task, trusted, "task")
    for name, spec in config.observers.items():
        check_arguments(spec, trusted, f"observers.{name}")
    Objective.of(build(config.loss, trusted, "loss"))
    # The patterns in `groups` are about the names of the run's own model.
    without_groups = config.model_copy(update={"optimizer": {**config.optimizer, "groups": []}})
    small = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    build_optimizer_for(without_groups, small, torch.device("cpu"))
    build_schedule(config, config.steps or sys.maxsize)
    share_out(config, sys.maxsize, _most_workers(config))


def _most_workers(config: RunConfig) -> int:
    if isinstance(config.workers, WorkerRange):
        return config.workers.max
    return 1 if config.workers == "auto" else int(config.workers)
