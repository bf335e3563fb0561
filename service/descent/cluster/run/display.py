"""The live view of a run on a terminal; plain lines where there is no terminal."""

import math
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from descent.messages import EvaluationRecord, Incident, TrainingRecord

_LINE_EVERY_S = 5.0
_SAME_STEP_S = 30.0
"""Between two lines while no step is taken: an evaluation, a save or a regroup is under way."""
_DRAW_EVERY_S = 0.2
_SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 32) -> str:
    """A curve in one line of text; what isn't finite is left out.

    >>> sparkline([0.0, 1.0, 2.0, 3.0], width=4)
    '▁▃▆█'
    """
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return ""
    stride = max(1, len(values) // width)
    values = values[::stride][-width:]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_SPARKS[round((v - low) / span * (len(_SPARKS) - 1))] for v in values)


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count != 1 else ''}"


class Display:
    """Progress, losses, throughput, waiting for data, world size and incidents; see `listeners.Listener`."""

    def __init__(self, console: Console, title: str, total_steps: int, batch_size: int, first_step: int = 0) -> None:
        self._console, self._title = console, title
        self._total, self._batch = total_steps, batch_size
        self._step = self._window_step = first_step
        self._loss = self._eval_loss = self._accuracy = math.nan
        self._best_accuracy, self._best_loss = -math.inf, math.inf
        self._rate = math.nan
        self._data_wait = math.nan
        self._world = self._generation = 0
        self._incidents = 0
        self._losses: list[float] = []
        self._window_at = time.monotonic()
        self._drawn = self._lined = 0.0
        self._lined_step = -1
        self._progress = Progress(
            TextColumn("step"),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=first_step)
        self._live: Live | None = None
        self._status = "starting"

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._live = Live(self._render(), console=self._console, auto_refresh=False, transient=True)
            self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
            self._live.__exit__(*exc)
            self._live = None

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        table.add_row("loss", f"{self._loss:.4f}" if self._losses else "–", sparkline(self._losses))
        if not math.isnan(self._eval_loss):
            accuracy = f"accuracy {self._accuracy:.2%}" if not math.isnan(self._accuracy) else ""
            table.add_row("evaluation", f"{self._eval_loss:.4f}", accuracy)
        workers = _workers(self._world) if self._world else self._status
        if self._generation > 1:
            workers += f", generation {self._generation}"
        if self._incidents:
            workers += f", {self._incidents} incident{'s' if self._incidents > 1 else ''}"
        table.add_row("speed", self._speed() or "–", workers)
        if not math.isnan(self._data_wait):
            table.add_row("data", self._waiting(), "")
        return Group(Text(self._title, style="bold"), self._progress, table)

    def _speed(self) -> str:
        """Empty until there has been a second of steps to measure."""
        return "" if math.isnan(self._rate) else f"{self._rate:,.0f} samples/s"

    def _waiting(self) -> str:
        return f"{self._data_wait:.1%} of the time waited for"

    def status(self, line: str) -> None:
        """What is being waited for before the first step."""
        self._status = line
        self._draw(force=True)

    def record(self, record: TrainingRecord, world_size: int) -> None:
        metrics = record.metrics
        self._world = world_size
        if isinstance(record, EvaluationRecord):
            self._eval_loss = metrics["eval/loss"]
            self._best_loss = min(self._best_loss, self._eval_loss)
            self._accuracy = metrics.get("eval/accuracy", math.nan)
            self._best_accuracy = max(self._best_accuracy, metrics.get("eval/accuracy", -math.inf))
            return
        self._step, self._loss = record.step, metrics["train/loss"]
        self._data_wait = metrics.get("perf/data_wait", self._data_wait)
        self._losses.append(self._loss)
        if len(self._losses) > 4096:
            self._losses = self._losses[::2]

    def incident(self, incident: Incident) -> None:
        self._incidents += 1
        who = f" {incident.worker}" if incident.worker else ""
        where = f" on {incident.host}" if incident.host else ""
        self.note(f"incident at step {incident.step}: {incident.kind}{who}{where}: {incident.detail}")

    def world(self, generation: int, world_size: int, step: int) -> None:
        self._world, self._generation = world_size, generation
        if generation > 1:
            self.note(f"generation {generation}: {_workers(world_size)} from step {step + 1} on")

    def note(self, line: str) -> None:
        self._console.print(f"[yellow]![/yellow] {line}", highlight=False, soft_wrap=True)

    def tick(self) -> None:
        self._draw(force=False)

    def _draw(self, force: bool) -> None:
        now = time.monotonic()
        if not force and now - self._drawn < _DRAW_EVERY_S:
            return
        self._drawn = now
        idle = not self._losses or now - self._window_at > _SAME_STEP_S
        if idle and self._step == self._window_step:
            self._window_at = now  # the speed is that of steps: what else takes long isn't in it
        if now - self._window_at >= 1.0 and self._step > self._window_step:
            self._rate = (self._step - self._window_step) * self._batch / (now - self._window_at)
            self._window_at, self._window_step = now, self._step
        if self._live is not None:
            self._progress.update(self._task, completed=self._step)
            self._live.update(self._render(), refresh=True)
        elif self._losses and now - self._lined >= self._line_every_s:
            self._lined, self._lined_step = now, self._step
            evaluation = f", eval {self._eval_loss:.4f}" if not math.isnan(self._eval_loss) else ""
            accuracy = f" ({self._accuracy:.2%})" if not math.isnan(self._accuracy) else ""
            data = "" if math.isnan(self._data_wait) else f", data {self._waiting()}"
            speed = f", {self._speed()}" if self._speed() else ""
            self._console.print(
                f"step {self._step:,}/{self._total:,}: loss {self._loss:.4f}{evaluation}{accuracy}{speed}"
                f"{data}, {_workers(self._world)}",
                highlight=False,
                soft_wrap=True,
            )

    @property
    def _line_every_s(self) -> float:
        return _LINE_EVERY_S if self._step != self._lined_step else _SAME_STEP_S

    @property
    def best(self) -> dict[str, float]:
        """The last and best evaluation figures of this process's part of the run."""
        found = {"eval/loss": self._eval_loss, "best eval/loss": self._best_loss}
        if not math.isnan(self._accuracy):
            found |= {"eval/accuracy": self._accuracy, "best eval/accuracy": self._best_accuracy}
        return {k: v for k, v in found.items() if math.isfinite(v)}
