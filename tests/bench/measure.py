"""Shared by the benchmarks: processes that are always cleaned up, the steady state of a real run, ratios."""

import contextlib
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
DESCENT = "from descent.cli.main import main; main()"
PAIRS = 3
_SETTLE_S = 2.0
PATIENCE_S = 120.0


class BenchError(Exception):
    """A measured process failed or took too long."""


@dataclass(frozen=True)
class Result:
    """One ratio: Descent's figure over the alternative's."""

    name: str
    ratio: float
    target: float | None
    better: str
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.target is None:
            return None
        return self.ratio <= self.target if self.better == "lower" else self.ratio >= self.target

    def to_json(self) -> str:
        return json.dumps(
            {
                "name": self.name,
                "ratio": round(self.ratio, 4),
                "target": self.target,
                "better": self.better,
                "detail": self.detail,
            }
        )


def result_of(
    name: str,
    pairs: Sequence[tuple[float, float]],
    target: float | None,
    better: str,
    **detail: Any,
) -> Result:
    """The median of the pairs' ratios (Descent / other): what slows both of a pair cancels out."""
    ratios = [ours / theirs for ours, theirs in pairs]
    return Result(
        name,
        statistics.median(ratios),
        target,
        better,
        {
            "descent": rounded(statistics.median(p[0] for p in pairs)),
            "other": rounded(statistics.median(p[1] for p in pairs)),
            "ratios": [rounded(r) for r in ratios],
            **detail,
        },
    )


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def worst(name: str, results: Sequence[Result]) -> Result:
    """Several results as one: the worst ratio in units of its target."""
    better = results[0].better
    shares = {r.name: r.ratio / r.target for r in results if r.target is not None}
    pick = max if better == "lower" else min
    detail = {r.name: {"ratio": rounded(r.ratio), "target": r.target, **r.detail} for r in results}
    return Result(name, pick(shares.values()), 1.0, better, {"unit": "ratio / target", **detail})


def show(console: Console, results: Sequence[Result], title: str) -> None:
    """A table with one line per ratio."""
    table = Table(title=title, title_justify="left")
    for column in ("benchmark", "descent", "other", "ratio", "pairs", "target", ""):
        table.add_column(column, justify="left" if column == "benchmark" else "right")
    for r in results:
        sign = "≤" if r.better == "lower" else "≥"
        table.add_row(
            r.name,
            str(r.detail.get("descent", "")),
            str(r.detail.get("other", "")),
            f"{r.ratio:.3f}",
            " ".join(f"{x:.2f}" for x in r.detail.get("ratios", ())),
            "–" if r.target is None else f"{sign} {r.target:g}",
            {True: "reached", False: "missed", None: ""}[r.reached],
        )
    console.print(table)


def progress(line: str) -> None:
    """Something has been measured: benchmarks take minutes, and silence looks like a hang."""
    print(f"  {line}", file=sys.stderr, flush=True)


def environment() -> dict[str, str]:
    """One thread each, this repository importable, nothing sent home, Ray's token in memory only."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'service'}{os.pathsep}{ROOT}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


@contextlib.contextmanager
def process(arguments: Sequence[str], folder: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """This Python with `arguments`, working in `folder`; it and its offspring are gone afterwards.

    more: environment variables.
    """
    with (folder / "stderr.txt").open("w+", encoding="utf-8") as stderr:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env={**environment(), **more},
            text=True,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            yield child
            if child.returncode:
                stderr.seek(0)
                raise BenchError(f"{' '.join(arguments)}: exit code {child.returncode}:\n{stderr.read()[-2000:]}")
        finally:
            _end(child)


def _signal_session(leader: int, number: signal.Signals) -> None:
    """Signal a process and whoever belongs to its session: a Ray cluster is a dozen of them."""
    for member in [leader, *psutil.pids()]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(member) == leader:
                os.kill(member, number)


def _end(child: subprocess.Popen[str]) -> None:
    for _ in range(2):  # the second time for those that were being born
        _signal_session(child.pid, signal.SIGKILL)
    child.wait()


def output_of(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a process to its end; the JSON object that is its last line."""
    with process(arguments, folder) as child:
        try:
            out, _ = child.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"{' '.join(arguments)}: took over {PATIENCE_S:g} s") from error
    lines = out.strip().splitlines()
    if not lines:
        raise BenchError(f"{' '.join(arguments)}: printed nothing")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def descent(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """`descent train … --json` to its end: the summary."""
    return output_of(["-c", DESCENT, "train", *overrides, "--json"], folder)


class Training:
    """A `descent train` that is watched from outside while it runs."""

    def __init__(self, child: subprocess.Popen[str], folder: Path) -> None:
        self._child, self._folder, self.pid = child, folder, child.pid
        self._offset = 0
        self.steps: list[tuple[int, int]] = []
        """(step, time in ms) of every step so far."""

    def read(self) -> None:
        """Take in what the run has logged since the last call. Raises BenchError when it ended."""
        for path in self._folder.glob(".descent/runs/*/metrics.jsonl"):
            with path.open(encoding="utf-8") as file:
                file.seek(self._offset)
                text = file.read()
            whole = text[: text.rfind("\n") + 1]
            self._offset += len(whole.encode())
            for line in whole.splitlines():
                step, time_ms, metrics = json.loads(line)
                if "train/loss" in metrics:
                    self.steps.append((step, time_ms))
        if self._child.poll() is not None:
            error = (self._folder / "stderr.txt").read_text(encoding="utf-8")
            raise BenchError(f"descent train ended by itself:\n{error[-2000:]}")

    def _story(self) -> str:
        """What is known of a run that got stuck, for whoever looks into it."""
        told = (self._folder / "stderr.txt").read_text(encoding="utf-8")[-1000:]
        ago = f"{time.time() - self.steps[-1][1] / 1000:.0f} s ago" if self.steps else "never"
        workers = [(p.pid, p.status()) for p in self.processes() if p.name().startswith("ray::")]
        incidents = [f.read_text(encoding="utf-8")[-1000:] for f in self.files("incidents.jsonl")]
        return f"last step {ago}; {self.status()}; {workers}; {incidents}; {told}"

    def tracked(self) -> bool:
        """Whether the tracking run is open: from then on metrics flow to MLflow."""
        for path in self._folder.glob(".descent/runs/*/run.json"):
            if json.loads(path.read_text(encoding="utf-8"))["run_id"]:
                return bool(self.steps)
        return False

    def files(self, name: str) -> list[Path]:
        """The run's files of this name: one, or none yet."""
        return list(self._folder.glob(f".descent/runs/*/{name}"))

    def status(self) -> dict[str, Any]:
        """The run's own word on how it stands."""
        for path in self.files("status.json"):
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        return {}

    def processes(self) -> list[psutil.Process]:
        """All processes of the run, its Ray cluster's included."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._child.pid).children(recursive=True)
        return []

    def wait_for(self, condition: Any, every_s: float = 0.1) -> None:
        """Read on until `condition()` holds."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.read()
            if condition():
                return
            if time.monotonic() > deadline:
                raise BenchError(f"descent train made no progress: {self._story()}")
            time.sleep(every_s)

    def worker(self) -> psutil.Process:
        """The process of the first worker actor."""
        for member in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if member.cmdline()[:1] and member.cmdline()[0].startswith("ray::Worker"):
                    return member
        raise BenchError("descent train has no worker process")


@contextlib.contextmanager
def training(overrides: Sequence[str], folder: Path) -> Iterator[Training]:
    """`descent train` under way, with tracking on; killed at the end of the block."""
    with process(["-c", DESCENT, "train", *overrides, "--json"], folder) as child:
        yield Training(child, folder)


class Steady:
    """A `descent train` in which everything has settled: its speed, window by window."""

    def __init__(self, run: Training) -> None:
        self._run = run

    def window(self, seconds: float) -> Mapping[str, float]:
        """Milliseconds a step over the next `seconds`.

        It is the wall time between two logged steps, so whatever happens in between counts:
        diagnostics, reports to the controller, its writes. `cpu_ms` is the CPU time of the
        worker's busiest thread, for machines that other work is on.
        """
        run = self._run
        worker = run.worker()
        before, begin = _thread_seconds(worker), time.time() * 1000
        since = time.monotonic()
        run.wait_for(lambda: time.monotonic() - since > seconds)
        after, stop = _thread_seconds(worker), time.time() * 1000
        time.sleep(0.5)  # the last records are on their way
        run.read()
        inside = [(s, t) for s, t in run.steps if begin <= t <= stop]
        if len(inside) < 2:
            raise BenchError(f"only {len(inside)} steps in {seconds} s")
        (a, t_a), (b, t_b) = inside[0], inside[-1]
        cpu_s = max(after[t] - before.get(t, 0.0) for t in after)
        return {"ms": (t_b - t_a) / (b - a), "cpu_ms": 1000 * cpu_s / (b - a)}

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """All its processes are stopped, so that the other side has the machine to itself."""
        _signal_session(self._run.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal_session(self._run.pid, signal.SIGCONT)
        since, steps = time.monotonic(), len(self._run.steps)
        self._run.wait_for(lambda: time.monotonic() - since > _SETTLE_S / 2 and len(self._run.steps) > steps + 5)


@contextlib.contextmanager
def steady(overrides: Sequence[str], folder: Path) -> Iterator[Steady]:
    """A real `descent train` once everything has settled.

    That is two seconds after the tracking run is open: by then the metrics of the first
    steps have been handed over and nothing is imported any more.
    """
    patient = ["regroup.heartbeat_s=600", "regroup.stall_s=600"]  # it will be set aside
    with training([*overrides, *patient], folder) as run:
        run.wait_for(run.tracked)
        since = time.monotonic()
        run.wait_for(lambda: time.monotonic() - since > _SETTLE_S and len(run.steps) > 5)
        yield Steady(run)


def _thread_seconds(worker: psutil.Process) -> dict[int, float]:
    return {t.id: t.user_time + t.system_time for t in worker.threads()}
