"""The price of fault tolerance while nothing fails: a step with it over a step without, 2 workers, about 10 ms.

The same processes hold two real `Trainer`s (on gloo, without Ray) that take turns, a
generation each, so that a busy machine slows both alike. Off means: what serves faults alone
is taken out. Waits are torch's own, in one piece and without a look at the abort flag; no
thread waits for an abort; no divergence sentinel; no assigning of slots by speed and no naming of
stragglers. What remains in both is what any training has, and what costs nothing to separate:
the small vector that carries the loss also carries the votes, two numbers.

Turns are short and many, in the order on, off, off, on, …, so that a slow drift of the
machine cancels out. Where a trainer's memory happens to lie makes it a few percent faster or
slower for as long as its process lives; so there are several launches, in which on and off are
built in turns first. The ratio is the median over all pairs of turns.
"""

import multiprocessing as mp
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.measure import BenchError, Result, progress, result_of
from tests.bench.subjects import SUBJECTS

_LAUNCHES = 4
_PAIRS = 5
_SECONDS = 1.5
_WARM_UP = 5
"""Steps of a turn that don't count."""
_WORLD = 2
_REDUCTIONS = ("exact", "fast")


def run() -> list[Result]:
    """One result per reduction; the default's (exact) as `fault_tax`."""
    results = [_measure(kind) for kind in _REDUCTIONS]
    first = results[0]
    return [*results, Result("fault_tax", first.ratio, first.target, "lower", first.detail)]


def _launch(reduction: str, number: int) -> list[tuple[float, float]]:
    """(on, off) seconds a step, pair by pair."""
    from descent.training.collectives import Store

    store = Store("127.0.0.1")
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        given, out = _composed(reduction), context.Queue()
        processes = [
            context.Process(target=_replica, args=(rank, store.port, given, number % 2, folder, out), daemon=True)
            for rank in range(_WORLD)
        ]
        for process in processes:
            process.start()
        try:
            found: list[tuple[float, float]] = out.get(timeout=150)
        except Exception as error:
            raise BenchError(f"{reduction}: {type(error).__name__} {error}") from error
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    return found


def _measure(reduction: str) -> Result:
    found = []
    for number in range(_LAUNCHES):
        rows = _launch(reduction, number)
        progress(f"{reduction}: {statistics.median(on / off for on, off in rows):.4f}")
        found += rows
    result = result_of(
        f"fault_tax_{reduction}",
        [(1e3 * on, 1e3 * off) for on, off in found],
        1.01,
        "lower",
        unit="ms a step; descent: fault tolerance on, other: off",
    )
    progress(f"{reduction}: {result.ratio:.4f} ({result.detail['descent']} ms a step)")
    quartiles = statistics.quantiles(result.detail["ratios"], n=4)
    return Result(result.name, result.ratio, result.target, "lower", {**result.detail, "quartiles": quartiles})


def _composed(reduction: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(config, plan) with fault tolerance on and off."""
    from descent.config import compose
    from descent.training.plan import prepare

    off = ["sentinel_every=null", "straggler.balance=false", "straggler.factor=1e9"]
    given = []
    for overrides in ([], off):
        config = compose(
            [
                *SUBJECTS["10ms"].overrides(),
                f"workers={_WORLD}",
                f"slots={_WORLD}",
                "resources.cpus=1",
                "checkpoint.every=null",
                f"reduction={reduction}",
                *overrides,
            ]
        ).config
        given.append((config.to_dict(), prepare(config, cores=2.0, gpus=0.0).plan.to_dict()))
    return given


@contextmanager
def _without_fault_tolerance() -> Iterator[None]:
    """The collectives as somebody would write them who never loses a worker."""
    from descent.training.collectives import Group

    def wait(self: Group, work: Any) -> None:  # noqa: ARG001
        if work is not None:
            work.wait()

    def watch(self: Group, processes: Any) -> None:
        """No thread that waits for an abort."""

    kept: list[tuple[Any, str, Callable[..., Any]]] = []
    for owner, name, plain in ((Group, "wait", wait), (Group, "watch", watch)):
        kept.append((owner, name, getattr(owner, name)))  # fails when it is no longer there
        setattr(owner, name, plain)
    try:
        yield
    finally:
        for owner, name, ours in kept:
            setattr(owner, name, ours)


def _replica(
    rank: int,
    port: int,
    given: list[tuple[dict[str, Any], dict[str, Any]]],
    first: int,
    folder: str,
    out: Any,
) -> None:
    """One process: its trainers take turns; rank 0 hands back the seconds a step, pair by pair."""
    import torch

    from descent.config import recompose
    from descent.messages import Membership
    from descent.training.plan import Plan
    from descent.training.slot_balancer import assign_slots
    from descent.training.trainer import Control, Trainer

    trainers: dict[int, tuple[Trainer, Control, Plan]] = {}
    for number in (first, 1 - first):
        config, plan = given[number]
        control, derived = Control(), Plan.from_dict(plan)
        trainer = Trainer(recompose(config), derived, Path(folder) / str(number), torch.device("cpu"), control)
        trainers[number] = (trainer, control, derived)
    generation = 0

    def turn(number: int) -> float:
        nonlocal generation
        trainer, control, derived = trainers[number]
        generation += 1
        control.records.clear()
        control.pause = False
        if rank == 0:
            threading.Timer(_SECONDS, setattr, (control, "pause", True)).start()
        trainer.run(
            Membership(
                generation, rank, _WORLD, "127.0.0.1", port, assign_slots(derived.slots, _WORLD), derived.micro_size
            )
        )
        trainer.finish_saving()
        steps = [r for r in control.records if "train/loss" in r.metrics][_WARM_UP:]
        return (steps[-1].time_ms - steps[0].time_ms) / 1000 / (steps[-1].step - steps[0].step)

    def off() -> float:
        with _without_fault_tolerance():
            return turn(1)

    rows = []
    for number in range(_PAIRS + 1):
        if number % 2:
            without = off()
            rows.append((turn(0), without))
        else:
            rows.append((turn(0), off()))
    if rank == 0:
        out.put(rows[1:])  # the first pair warmed both up
