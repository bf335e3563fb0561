"""Trainers that take turns in the same processes, so that a busy machine slows all of them alike.

Each process holds one real `Trainer` a kind (on gloo, without Ray). A turn is a generation: it
begins with a join and ends by a vote to pause, as in a real run.
"""

import multiprocessing as mp
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.measure import BenchError
from tests.bench.subjects import SUBJECTS

_SECONDS = 2.0
_WARM_UP = 3
"""Steps of a turn that don't count: the first builds DDP's buckets or the tree's plan."""
_PATIENCE_S = 300.0
_Given = Sequence[tuple[dict[str, Any], dict[str, Any]]]


def seconds_a_step(name: str, world: int, kinds: Sequence[Sequence[str]], turns: int) -> list[tuple[float, ...]]:
    """Per turn the seconds a step of each kind; a first turn, which warms all up, is left out.

    name: of the subject. kinds: what each kind adds to its overrides.
    """
    from descent.training.collectives import Store

    store, context = Store("127.0.0.1"), mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        given, out = _composed(name, world, kinds), context.Queue()
        processes = [
            context.Process(target=_replica, args=(rank, world, store.port, given, turns, folder, out), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            rows: list[tuple[float, ...]] = out.get(timeout=_PATIENCE_S)
        except Exception as error:
            raise BenchError(f"{name}, {world} workers: {type(error).__name__} {error}") from error
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    return rows


def _composed(name: str, world: int, kinds: Sequence[Sequence[str]]) -> _Given:
    """(config, plan) of each kind."""
    from descent.config import compose
    from descent.training.plan import prepare

    given = []
    for overrides in kinds:
        config = compose(
            [
                *SUBJECTS[name].overrides(),
                f"workers={world}",
                "resources.cpus=0.5",
                "checkpoint.every=null",
                *overrides,
            ]
        ).config
        given.append((config.to_dict(), prepare(config, cores=2.0, gpus=0.0).plan.to_dict()))
    return given


def _replica(rank: int, world: int, port: int, given: _Given, turns: int, folder: str, out: Any) -> None:
    """One process: its trainers take turns; rank 0 hands back the seconds a step, turn by turn."""
    import torch

    from descent.config import recompose
    from descent.messages import Membership, StepRecord
    from descent.training.control import Control
    from descent.training.plan import Plan
    from descent.training.slot_balancer import assign_slots
    from descent.training.trainer import Trainer

    trainers = []
    for number, (config, plan) in enumerate(given):
        control, derived = Control(), Plan.from_dict(plan)
        trainer = Trainer(recompose(config), derived, Path(folder) / str(number), torch.device("cpu"), control)
        trainers.append((trainer, control, derived))
    rows, generation = [], 0
    for _ in range(turns + 1):
        row = []
        for trainer, control, derived in trainers:
            generation += 1
            control.records.clear()
            control.pause = False
            if rank == 0:
                threading.Timer(_SECONDS, setattr, (control, "pause", True)).start()
            slots = assign_slots(derived.slots, world)
            trainer.run(Membership(generation, rank, world, "127.0.0.1", port, slots, derived.micro_size))
            trainer.finish_saving()
            steps = [r for r in control.records if isinstance(r, StepRecord)][_WARM_UP:]
            row.append((steps[-1].time_ms - steps[0].time_ms) / 1000 / (steps[-1].step - steps[0].step))
        rows.append(tuple(row))
    if rank == 0:
        out.put(rows[1:])
