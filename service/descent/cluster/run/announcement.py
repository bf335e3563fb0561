"""A run's first lines: its name, what is about to be trained, and what is special about it."""

import os
import time
from typing import TYPE_CHECKING

from rich.console import Console

from descent.cluster.run.console import print_line
from descent.cluster.run.display import Display
from descent.cluster.run.resume import Resumed, schedule_change
from descent.config import Composed, RunConfig

if TYPE_CHECKING:
    from descent.training.plan import Prepared

_BEGINS_AGAIN = "the run's process died before the first checkpoint: beginning again at its first step"


def announce(
    console: Console,
    display: Display,
    name: str,
    config: RunConfig,
    prepared: "Prepared",
    resumed: Resumed | None,
    *,
    room: int,
    private: bool,
) -> None:
    """Print what is about to be trained, in one line, and what is special about it.

    room: how many workers the cluster's GPUs have room for. private: whether the cluster is the run's own.
    """
    plan = prepared.plan
    workers = f"{plan.max_workers} worker{'s' if plan.max_workers > 1 else ''}"
    accumulation = -(-max(b - a for a, b in _bounds(plan.batch_size, plan.slots)) // plan.micro_size)
    print_line(
        console,
        f"{name}: {plan.num_parameters:,} parameters, {plan.num_samples:,} samples, "
        f"{plan.total_steps:,} steps of {plan.batch_size:,} on {workers} ({plan.device}), "
        f"{plan.slots} slots x {accumulation} micro-batch{'es' if accumulation > 1 else ''}, "
        f"reduction {config.reduction}",
    )
    if prepared.understood:
        print_line(console, f"task: the loss {'of' if plan.phases else 'is'} {prepared.understood}")
    if prepared.trained_of_loss:
        print_line(
            console,
            f"the loss has parameters of its own, which are trained too: {', '.join(prepared.trained_of_loss)} "
            "(requires_grad_(False) in its __init__ leaves them as they are)",
        )
    follows = [f"{k}={v}" for k, v in (("slots", "workers"), ("reduction", "fast")) if getattr(config, k) == v]
    if follows and plan.max_workers > 1:
        print_line(console, f"{' and '.join(follows)}: the result's bits hold for {workers} only")
    if config.workers == "auto" and plan.gpus and room > plan.max_workers:
        display.note(
            f"workers=auto: {plan.max_workers} workers, one for each of slots={plan.slots}, though the GPUs have "
            f"room for {room}; slots={room} uses all of them (and gives other bits)"
        )
    if config.chaos.faults:
        display.note(f"chaos.faults={config.chaos.faults} are to come; they don't count towards regroup.max_failures")
        weights = [kind for kind in ("raylet", "gcs") if config.chaos.kinds.get(kind, 0) > 0]
        if weights and not private:
            display.note(f"chaos: {' and '.join(weights)} are left out, because others may use this cluster too")
    if resumed is not None:
        for reason in resumed.skipped:
            display.note(f"skipped checkpoint: {reason}")
        changed = schedule_change(config, resumed, plan.total_steps)
        if changed is not None:
            display.note(changed)
        source = resumed.checkpoint
        where = f"going on from step {resumed.step:,} ({source.name})" if source else _BEGINS_AGAIN
        print_line(console, where)


def _bounds(batch: int, slots: int) -> list[tuple[int, int]]:
    from descent.training.input.sampling import slot_bounds

    return slot_bounds(batch, slots)


def name_of(composed: Composed) -> str:
    """The run's name: given, or the time, data and model.

    What tells runs apart comes first, because MLflow's tables show about the first 25 characters.
    """
    if composed.config.name:
        return composed.config.name
    config = composed.config
    data = _class_name(config.data.train["_target_"]) if config.data.name == "custom" else config.data.name
    model = composed.choices.get("model", "custom")
    model = _class_name(config.model["_target_"]) if model == "custom" else model
    return f"{time.strftime('%m%d-%H%M')}-{os.urandom(2).hex()}-{data}-{model}"[:128].rstrip("-.")


def _class_name(target: str) -> str:
    """The class of a `_target_`, as a part of a folder's name."""
    return "".join(c if c.isalnum() or c in "_-" else "-" for c in target.rpartition(".")[2]).lower()
