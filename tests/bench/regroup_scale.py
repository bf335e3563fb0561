"""How a regroup's cost grows with the workers: 2, 4, 8 and 16 processes on this machine, one is killed.

Real `Trainer`s on gloo, without Ray: this process stands for the controller, over pipes. From
the kill until all survivors have committed the next step, split into what happens one after
the other: `detect` (somebody notices: a survivor by its connection, or whoever watches the
process, as Ray does), `abort` (all survivors have left the broken generation), `meet`
(all are in the store under the new generation's name), `connect` (all have connected to all,
and said so in the store), `step` (the interrupted step, again), and, where a newcomer joins,
`receive` (the state's broadcast). A line a + b·f(n) is fitted to each term, with the f among
1, n, n log n and n² that leaves the least error (a constant where nothing grows), and
continued to 64 and 512.

All processes share this machine's cores: work that every process does by itself (connecting to
n - 1 others, its part of a step) counts n times per core here, and once where each has a core
of its own. So each term but `detect`, which waits, is also fitted divided by the processes per
core, and both are continued: `shared` as measured, `own` for one core each. Between machines there is a
network; its latency is not in here.
"""

import math
import multiprocessing as mp
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.measure import BenchError, Result, progress, rounded

_WORLDS = (2, 4, 8, 16)
_PREDICTED = (64, 512)
_KILLS = 5
_PATIENCE_S = 60.0
TERMS = ("detect", "abort", "meet", "connect", "step", "receive")
_GROWTH: dict[str, Callable[[float], float]] = {
    "1": lambda n: 0.0,  # noqa: ARG005
    "n": lambda n: n,
    "n log n": lambda n: n * math.log2(n),
    "n²": lambda n: n * n,
}
_OVERRIDES = [
    "data=digits",
    "model=mlp",
    "model.depth=2",
    "model.width=128",
    "batch.size=128",
    "evaluate.every=end",
    "epochs=null",
    "steps=1000000",
    "checkpoint.every=null",
    "sentinel_every=null",
    "diagnostics.every=1000000",
]


def run() -> list[Result]:
    """One result, without a target: the seconds at 16 processes."""
    measured = {world: _measure(world) for world in _WORLDS}
    fitted = {term: fit({n: m[term] for n, m in measured.items()}) for term in TERMS}
    cores = len(os.sched_getaffinity(0))
    own = {
        term: fit({n: m[term] / (_per_core(n, cores) if term != "detect" else 1.0) for n, m in measured.items()})
        for term in TERMS
    }
    _print(measured, fitted, own)
    killed = {n: sum(m[t] for t in TERMS if t != "receive") for n, m in measured.items()}
    return [
        Result(
            "regroup_scale",
            killed[_WORLDS[-1]],
            None,
            "lower",
            {
                "unit": f"s at {_WORLDS[-1]} processes on {cores} cores",
                "descent": rounded(killed[_WORLDS[-1]]),
                "ratios": [rounded(killed[n]) for n in _WORLDS],
                "worlds": list(_WORLDS),
                "terms_s": {n: {t: rounded(s) for t, s in m.items()} for n, m in measured.items()},
                "shared": fitted,
                "own_core": own,
                "total_s": {
                    name: {m: rounded(sum(f[t][f"at_{m}_s"] for t in TERMS if t != "receive")) for m in _PREDICTED}
                    for name, f in (("shared", fitted), ("own_core", own))
                },
            },
        )
    ]


def _per_core(processes: int, cores: int) -> float:
    return max(1.0, processes / cores)


def fit(points: dict[int, float]) -> dict[str, Any]:
    """a + b·f(n) by least squares: the f, a and b, the residual and what it says for larger n.

    What didn't occur (one survivor of two meets nobody) is left out. A growing form must halve the constant's error, or the constant stays: four points
    with noise would otherwise always grow. Neither a nor b may be negative.
    """
    there = {n: s for n, s in points.items() if s > 0}
    n, seconds = np.array(list(there)), np.array(list(there.values()))
    found = []
    for name, growth in _GROWTH.items():
        f = np.array([growth(float(x)) for x in n])
        columns = np.stack([np.ones(len(n)), f], axis=1) if name != "1" else np.ones((len(n), 1))
        solution = np.linalg.lstsq(columns, seconds, rcond=None)[0]
        a, b = float(solution[0]), float(solution[1]) if name != "1" else 0.0
        if b < 0:
            continue
        if a < 0:  # through the origin
            a, b = 0.0, float(f @ seconds / (f @ f))
        error = float(np.sqrt(np.mean((a + b * f - seconds) ** 2)))
        found.append((error, name, a, b))
    constant = next(entry for entry in found if entry[1] == "1")
    best = min(found)
    error, name, a, b = best if best[0] < constant[0] / 2 else constant
    return {
        "grows_as": name,
        "a_s": rounded(a),
        "b_s": rounded(b),
        "rms_error_s": rounded(error),
        **{f"at_{m}_s": rounded(a + b * _GROWTH[name](m)) for m in _PREDICTED},
    }


def _print(measured: dict[int, dict[str, float]], shared: dict[str, Any], own: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="regroup_scale: milliseconds by term", title_justify="left")
    headings = [
        *map(str, _WORLDS),
        "grows as",
        *(f"{m} shared" for m in _PREDICTED),
        "own: as",
        *(f"{m} own" for m in _PREDICTED),
    ]
    for heading in ("term", *headings):
        table.add_column(heading, justify="left" if heading == "term" else "right")
    for term in TERMS:
        table.add_row(
            term,
            *(f"{1e3 * measured[n][term]:.1f}" for n in _WORLDS),
            *(
                cell
                for f in (shared, own)
                for cell in (f[term]["grows_as"], *(f"{1e3 * f[term][f'at_{m}_s']:.0f}" for m in _PREDICTED))
            ),
        )
    Console(width=120).print(table)


# -- the processes -------------------------------------------------------------------------


def _replica(pipe: Connection, config: dict[str, Any], plan: dict[str, Any], folder: str) -> None:
    """One worker: takes memberships from the pipe and says when it came through what."""
    import torch

    from descent.config import recompose
    from descent.training import collectives
    from descent.training.plan import Plan
    from descent.training.trainer import Control, Trainer

    times: dict[str, float] = {}
    meet = collectives._meet

    def timed(*arguments: Any) -> list[str]:
        answers = meet(*arguments)
        times[str(arguments[2])] = time.time()  # "here" or "connected"
        return answers

    collectives._meet = timed
    lock = threading.Lock()

    class Watched(Control):
        def enter(self, phase: str) -> None:
            if phase == "step":
                if times.get("phase") == 0.0:
                    times["receive"] = time.time()
                if times.get("phase") == 1.0:
                    with lock:
                        pipe.send(("stepped", {**times, "step": time.time()}))
                times["phase"] = times.get("phase", 0.0) + 1.0
            super().enter(phase)

    control = Watched()
    trainer = Trainer(recompose(config), Plan.from_dict(plan), Path(folder), torch.device("cpu"), control)

    def train(membership: Any) -> None:
        times.clear()
        times["phase"] = 0.0
        try:
            outcome = trainer.run(membership)
        except collectives.PeerLost:
            outcome = "broken"
        with lock:
            pipe.send((outcome, {"at": time.time(), "progress": control.step}))

    pipe.send(("built", {}))
    while True:
        try:
            command, argument = pipe.recv()
        except EOFError:
            os._exit(0)
        if command == "join":
            control.abort.clear()
            control.pause = False
            threading.Thread(target=train, args=(argument,), daemon=True).start()
        elif command == "abort":
            control.abort.set()
        else:
            control.pause = True


class _Run:
    """A run of `world` processes and the part of the controller."""

    def __init__(self, world: int, folder: str) -> None:
        from descent.config import compose
        from descent.training.collectives import Store
        from descent.training.plan import prepare

        composed = compose(
            [
                *_OVERRIDES,
                f"workers={world}",
                f"slots={world}",
                f"resources.cpus={1 / world}",
                "device=cpu",
            ]
        )
        plan = prepare(composed.config, cores=1.0, gpus=0.0).plan
        self._plan, self._folder = plan, folder
        self._given = (composed.config.to_dict(), plan.to_dict(), folder)
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.distributed.preload", "descent.training.trainer"])
        self._store = Store("127.0.0.1")
        self._generation = 0
        self.pipes: list[Connection] = []
        self._processes: dict[Connection, Any] = {}

    def add(self, count: int) -> list[Connection]:
        """More processes, built and waiting."""
        fresh = []
        for _ in range(count):
            pipe, theirs = self._context.Pipe()
            process = self._context.Process(target=_replica, args=(theirs, *self._given), daemon=True)
            process.start()
            theirs.close()
            self._processes[pipe] = process
            fresh.append(pipe)
        for pipe in fresh:
            _expect(pipe, "built")
        return fresh

    def form(self, pipes: list[Connection], behind: tuple[int, ...]) -> tuple[float, list[dict[str, float]]]:
        """The next generation; when it was told, and when each member came through what."""
        from descent.messages import Membership
        from descent.training.slot_balancer import assign_slots

        self.pipes = pipes
        self._generation += 1
        told = time.time()
        for rank, pipe in enumerate(pipes):
            pipe.send(
                (
                    "join",
                    Membership(
                        self._generation,
                        rank,
                        len(pipes),
                        self._store.host,
                        self._store.port,
                        assign_slots(self._plan.slots, len(pipes)),
                        self._plan.micro_size,
                        behind,
                    ),
                )
            )
        return told, [_expect(pipe, "stepped") for pipe in pipes]

    def pause(self) -> None:
        self.pipes[0].send(("pause", None))
        for pipe in self.pipes:
            _expect(pipe, "paused")

    def kill(self) -> tuple[float, float, float, list[int]]:
        """Kill the last member: when, when the first survivor broke, when all had left, their progress."""
        victim = self.pipes.pop()
        at = time.time()
        self._processes[victim].kill()
        first: float | None = None
        left = dict.fromkeys(self.pipes, (0.0, 0))
        waiting = set(self.pipes)
        while waiting:
            ready = wait([*waiting, victim] if first is None else list(waiting), _PATIENCE_S)
            if not ready:
                raise BenchError("survivors hang")
            if first is None:
                first = time.time()
                for pipe in waiting:
                    pipe.send(("abort", None))
            for pipe in waiting & set(ready):
                told = _expect(pipe, "broken")
                left[pipe] = (told["at"], int(told["progress"]))
                waiting.discard(pipe)
        assert first is not None
        return at, first, max(time.time(), first), [progress for _, progress in left.values()]

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()


def _expect(pipe: Connection, wanted: str) -> dict[str, float]:
    """The next word of this kind; what came late of another kind is passed over."""
    deadline = time.monotonic() + _PATIENCE_S
    while pipe.poll(max(0.0, deadline - time.monotonic())):
        word, told = pipe.recv()
        if word == wanted:
            found: dict[str, float] = told
            return found
    raise BenchError(f"a process never said '{wanted}'")


def _measure(world: int) -> dict[str, float]:
    """Median seconds of each term over some kills, each followed by a newcomer."""
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(world, folder)
        try:
            run.form(run.add(world), tuple(range(1, world)))
            for _ in range(_KILLS):
                newcomer = run.add(1)
                time.sleep(0.5)
                at, first, left, steps = run.kill()
                newest = max(range(len(steps)), key=steps.__getitem__)
                order = [run.pipes[newest], *(p for i, p in enumerate(run.pipes) if i != newest)]
                progress_of = dict(zip(run.pipes, steps, strict=True))
                behind = tuple(r for r, p in enumerate(order) if progress_of[p] < max(steps))
                told, came = run.form(order, behind)
                row = _terms(told, came)
                row.update(detect=first - at, abort=left - first)
                time.sleep(0.2)
                run.pause()
                told, came = run.form([*run.pipes, *newcomer], (world - 1,))
                row["receive"] = _terms(told, came)["receive"]
                rows.append(row)
        finally:
            run.close()
    found = {term: statistics.median(r[term] for r in rows) for term in TERMS}
    total = sum(s for t, s in found.items() if t != "receive")
    progress(f"{world} processes: {total:.3f} s, median of {_KILLS} kills")
    return found


def _terms(told: float, came: list[dict[str, float]]) -> dict[str, float]:
    """From one moment at which all were through to the next."""
    moments = [told]
    for name in ("here", "connected", "receive", "step"):
        moments.append(max(max(t.get(name, 0.0) for t in came), moments[-1]))
    names = ("meet", "connect", "receive", "step")
    return {name: b - a for name, a, b in zip(names, moments, moments[1:], strict=False)}
