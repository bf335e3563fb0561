"""From the SIGKILL of a worker to the next committed step, and the steps lost, for 2 and 4 workers.

Descent is the real `descent train`, with reduction=exact, as it is by default, and with fast;
a worker's process is killed from outside again and again, as soon as its replacement has
joined and the run is steady. The peers are Ray Train's TorchTrainer with a FailureConfig and
DDP under `torchrun --max-restarts`, both with a checkpoint every 50 steps, and Ray Train with
its own TorchftConfig, whose survivors go on by themselves once the training code has been
rewritten for torchft (`elastic.py`). They take turns with Descent. With 4 workers two processes share each of two cores, everywhere.

The clock is the machine's: from just before the signal to the time stamp of the first step
after the interruption. A step that was already reduced when the signal came may still be
committed a moment later; it doesn't end the interruption. Steps lost are those that had been
committed and had to be computed again. A peer that takes no step for `_GIVE_UP_S` has failed;
this is told as such and makes no figure. It is then started again, since a figure in which it
did recover is the fairer one.
"""

import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.bench.elastic import STEPS_FILE
from tests.bench.measure import (
    PATIENCE_S,
    BenchError,
    Result,
    Training,
    environment,
    process,
    progress,
    rounded,
    training,
)
from tests.bench.subjects import SUBJECTS

_SUBJECT = "10ms"
_WORLDS = (2, 4)
_KILLS = 5
_PEER_KILLS = 2
_PEER_TRIES = 3
_STEADY_STEPS = 30
_GIVE_UP_S = 60.0
_TARGET_S = 0.5
_PEERS = {"ray_train": 20.0, "torchrun": 5.0, "torchft": 2.0}
"""Peer -> how many times its seconds Descent's are to be."""


@dataclass
class Trials:
    """What several kills of one kind of run have cost."""

    seconds: list[float] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """How it did not come back, once for each time."""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def detail(self) -> dict[str, object]:
        return {
            "seconds": [rounded(s) for s in self.seconds],
            "steps_lost": self.lost,
            "kills": len(self.seconds),
            **({"failed": self.failed} if self.failed else {}),
        }


def run() -> list[Result]:
    """Per world Descent's seconds and its ratios to the peers; the slowest as `recovery`."""
    results: list[Result] = []
    for world in _WORLDS:
        exact = _descent(world, "exact")
        peers = {"ray_train": _peer(world, "ray_train")}
        fast = _descent(world, "fast")
        peers |= {kind: _peer(world, kind) for kind in ("torchrun", "torchft")}
        for name, ours in ((f"recovery_{world}", exact), (f"recovery_{world}_fast", fast)):
            results += _results(name, ours, peers)
    own = [r for r in results if r.detail.get("unit") == "s"]
    lost = max(r.detail["steps_lost_most"] for r in own)
    slowest = max(own, key=lambda r: r.ratio)
    results.append(
        Result(
            "recovery_steps_lost",
            lost,
            0.0,
            "lower",
            {"kills": sum(r.detail["kills"] for r in own)},
        )
    )
    return [
        *results,
        Result("recovery", slowest.ratio, _TARGET_S, "lower", {"of": slowest.name, **slowest.detail}),
    ]


def _results(name: str, ours: Trials, peers: dict[str, Trials]) -> list[Result]:
    if ours.median is None:
        raise BenchError(f"{name}: {ours.failed}")
    results = [
        Result(
            name,
            ours.median,
            _TARGET_S,
            "lower",
            {
                "unit": "s",
                "descent": rounded(ours.median),
                "ratios": [rounded(s) for s in ours.seconds],
                "kills": len(ours.seconds),
                "steps_lost_most": max(ours.lost),
                **{kind: trials.detail() for kind, trials in peers.items()},
            },
        )
    ]
    for peer, trials in peers.items():
        if trials.median is not None:
            results.append(
                Result(
                    f"{name}_to_{peer}",
                    trials.median / ours.median,
                    _PEERS[peer],
                    "higher",
                    {
                        "descent": rounded(ours.median),
                        "other": rounded(trials.median),
                        **trials.detail(),
                    },
                )
            )
    return results


# -- Descent -------------------------------------------------------------------------------


def _descent(world: int, reduction: str) -> Trials:
    trials = Trials()
    overrides = [
        *SUBJECTS[_SUBJECT].overrides(),
        f"workers={world}",
        f"resources.cpus={2 / world}",
        f"reduction={reduction}",
        "regroup.max_failures=1000",
    ]
    with tempfile.TemporaryDirectory() as folder, training(overrides, Path(folder)) as run:
        run.wait_for(run.tracked)
        for _ in range(_KILLS):
            _until_steady(run, world)
            members = _workers(run)
            # The last one that came, or the first: rank 0 and the others in turn.
            victim = members[-1] if len(trials.seconds) % 2 else members[0]
            known = len(run.steps)
            at_ms = time.time() * 1000
            os.kill(victim, signal.SIGKILL)
            run.wait_for(lambda at_ms=at_ms: sum(t > at_ms for _, t in run.steps) > 10, 0.02)
            trials.seconds.append((_resumed_ms(run, known, at_ms) - at_ms) / 1000)
            progress(f"descent, {world} workers, {reduction}: {trials.seconds[-1]:.2f} s")
        run.read()
        trials.lost = [max((i["steps_lost"] for i in _incidents(run)), default=0)]
        numbers = [step for step, _ in run.steps]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise BenchError("descent train logged its steps with a gap or twice")
    return trials


def _resumed_ms(run: Training, known: int, at_ms: float) -> float:
    """When the first step after the interruption was committed: the one behind the longer of two gaps."""
    times = [t for _, t in run.steps[max(known - 1, 0) :]]
    after = next(i for i, t in enumerate(times) if t > at_ms)
    gaps = [(times[i] - times[i - 1], i) for i in (after, after + 1) if i > 0]
    return times[max(gaps)[1]]


def _until_steady(run: Training, world: int) -> None:
    """All members there, and some dozens of steps in this generation."""

    def generation() -> int | None:
        status = run.status()
        return status["generation"] if status.get("world_size") == world else None

    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        run.wait_for(lambda: generation() is not None)
        now, steps = generation(), len(run.steps)
        run.wait_for(lambda steps=steps: len(run.steps) > steps + _STEADY_STEPS)
        if generation() == now and len(_workers(run)) == world:
            return
    raise BenchError(f"descent train did not come back to {world} workers")


def _workers(run: Training) -> list[int]:
    """The worker actors' processes, oldest first."""
    found = [p for p in run.processes() if p.name().startswith("ray::Worker")]
    return [p.pid for p in sorted(found, key=lambda p: (p.create_time(), p.pid))]


def _incidents(run: Training) -> list[dict[str, int]]:
    return [
        json.loads(line)
        for path in run.files("incidents.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


# -- the peers -----------------------------------------------------------------------------


def _peer(world: int, kind: str) -> Trials:
    trials = Trials()
    for _ in range(_PEER_TRIES):
        with tempfile.TemporaryDirectory() as name:
            try:
                _kill_some(world, kind, Path(name), trials)
            except BenchError as error:
                trials.failed.append(str(error).splitlines()[0])
                progress(f"{kind}, {world} workers: failed: {trials.failed[-1]}")
        if trials.seconds:
            break
    return trials


def _kill_some(world: int, kind: str, folder: Path, trials: Trials) -> None:
    own = ["-m", "tests.bench.elastic", _SUBJECT, str(folder)]
    arguments = {
        "ray_train": [*own, str(world)],
        "torchft": [*own, str(world), "torchft"],
        "torchrun": [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            "--max-restarts=8",
            *own,
        ],
    }[kind]
    # Left to itself, torchrun's new workers meet in the store of the old ones, find their
    # addresses there and wait for them: with 4 workers it never came back (pytorch issue 135712,
    # whose remedy this is).
    more = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if kind == "torchft":
        more["PYTHONPATH"] = os.pathsep.join([environment()["PYTHONPATH"], _torchft_folder()])
    with process(arguments, folder, **more) as child:
        for _ in range(_PEER_KILLS):
            _kill_one(child, folder, world, trials)
            progress(f"{kind}, {world} workers: {trials.seconds[-1]:.2f} s, {trials.lost[-1]} steps lost")


def _torchft_folder() -> str:
    """Where `make bench` has put torchft: not into the environment, where its exporters stop Ray's job agent."""
    folder = os.environ.get("TORCHFT", "")
    if not Path(folder, "torchft").is_dir():
        raise BenchError("torchft is not installed: run it by make bench")
    return folder


def _kill_one(child: "subprocess.Popen[str]", folder: Path, world: int, trials: Trials) -> None:
    before = len(_steps(folder))
    _wait(child, lambda: len(_steps(folder)) > before + 2 * _STEADY_STEPS, PATIENCE_S, "took no step")
    victim = int((folder / f"pid-{world - 1}.txt").read_text())
    if not psutil.pid_exists(victim):
        raise BenchError("the worker to be killed is not there")
    at = time.time()
    os.kill(victim, signal.SIGKILL)
    time.sleep(0.2)  # whoever was in the middle of a step has committed it or failed
    last = _steps(folder)[-1]
    known = len(_steps(folder))
    _wait(
        child,
        lambda: len(_steps(folder)) > known,
        _GIVE_UP_S,
        f"took no step for {_GIVE_UP_S:.0f} s after the kill",
    )
    step, when = _steps(folder)[known]
    trials.seconds.append(when - at)
    trials.lost.append(last[0] - step + 1)


def _steps(folder: Path) -> list[tuple[int, float]]:
    path = folder / STEPS_FILE
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(int(step), float(when)) for step, when in map(str.split, lines)]


def _wait(child: "subprocess.Popen[str]", condition: object, patience_s: float, wrong: str) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():  # type: ignore[operator]
        if child.poll() is not None:
            raise BenchError(f"ended with exit code {child.returncode} after the kill")
        if time.monotonic() > deadline:
            raise BenchError(wrong)
        time.sleep(0.05)
