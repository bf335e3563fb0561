"""What `reduction=exact` costs: its throughput over that of `reduction=fast`, at 2 and at 4 workers.

The same processes hold a trainer of each kind (the real `Trainer`, on gloo, without Ray) and
let them take turns, a generation each, so that a busy machine slows both alike. Both
have as many slots as there are workers. A turn ends by a vote to pause, as in a real run.
With 4 workers two processes share a core where there are only two, on both sides.
"""

import multiprocessing as mp
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.measure import BenchError, Result, progress, result_of, worst
from tests.bench.subjects import SUBJECTS

_TURNS = 4
_SECONDS = 2.0
_KINDS = ("exact", "fast")
_WARM_UP = 3
"""Steps of a turn that don't count: the first builds DDP's buckets or the tree's plan."""


def run() -> list[Result]:
    """One result per number of workers, and the worse as `exactness`."""
    results = [_measure(world, name) for name in ("10ms", "resnet") for world in (2, 4)]
    return [*results, worst("exactness", results)]


def _measure(world: int, name: str) -> Result:
    from descent.training.collectives import Store

    store = Store("127.0.0.1")
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        given, out = _composed(world, name), context.Queue()
        processes = [
            context.Process(target=_replica, args=(rank, world, store.port, given, folder, out), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            found: list[tuple[float, float]] = out.get(timeout=150)
        except Exception as error:
            raise BenchError(f"{world} workers: {type(error).__name__} {error}") from error
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    batch = SUBJECTS[name].batch
    pairs = [(batch / exact, batch / fast) for exact, fast in found]
    result = result_of(
        f"exactness_{name}_{world}",
        pairs,
        0.9,
        "higher",
        unit="samples/s; descent: exact, other: fast",
    )
    progress(f"{name}, {world} workers: exact at {result.ratio:.3f} of fast")
    return result


def _composed(world: int, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(config, plan) of each kind."""
    from descent.config import compose
    from descent.training.plan import prepare

    given = []
    for kind in _KINDS:
        config = compose(
            [
                *SUBJECTS[name].overrides(),
                f"workers={world}",
                f"slots={world}",
                "resources.cpus=0.5",
                "checkpoint.every=null",
                f"reduction={kind}",
            ]
        ).config
        given.append((config.to_dict(), prepare(config, cores=2.0, gpus=0.0).plan.to_dict()))
    return given


def _replica(
    rank: int,
    world: int,
    port: int,
    given: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    folder: str,
    out: Any,
) -> None:
    """One process: its trainers take turns; rank 0 hands back the seconds a step, turn by turn."""
    import torch

    from descent.config import recompose
    from descent.messages import Membership
    from descent.training.plan import Plan
    from descent.training.slot_balancer import assign_slots
    from descent.training.trainer import Control, Trainer

    trainers = []
    for kind, (config, plan) in zip(_KINDS, given, strict=True):
        control, derived = Control(), Plan.from_dict(plan)
        trainer = Trainer(recompose(config), derived, Path(folder) / kind, torch.device("cpu"), control)
        trainers.append((trainer, control, derived))
    rows, generation = [], 0
    for _ in range(_TURNS):
        took = []
        for trainer, control, derived in trainers:
            generation += 1
            control.records.clear()
            control.pause = False
            if rank == 0:
                threading.Timer(_SECONDS, setattr, (control, "pause", True)).start()
            trainer.run(
                Membership(
                    generation, rank, world, "127.0.0.1", port, assign_slots(derived.slots, world), derived.micro_size
                )
            )
            trainer.finish_saving()
            steps = [r for r in control.records if "train/loss" in r.metrics][_WARM_UP:]
            took.append((steps[-1].time_ms - steps[0].time_ms) / 1000 / (steps[-1].step - steps[0].step))
        rows.append((took[0], took[1]))
    if rank == 0:
        out.put(rows[1:])  # the first turns warmed both up
