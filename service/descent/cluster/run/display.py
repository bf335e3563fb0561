"""The live view of a run on a terminal; plain lines where there is no terminal."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from descent.cluster.run.console import duration, print_line, print_warning, significant
from descent.messages import EvaluationRecord, Incident, TrainingRecord

_LINE_EVERY_S = 5.0
_SAME_STEP_S = 30.0
"""Between two lines while no step is taken: an evaluation, a save or a regroup is under way."""
_DRAW_EVERY_S = 0.2
_SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 32) -> str:
    """A curve in one line of text; values that aren't finite are left out.

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
    """Progress, losses, throughput, waiting for data, world size and incidents; see `record.listener.Listener`."""

    def __init__(
        self,
        console: Console,
        title: str,
        total_steps: int,
        batch_size: int,
        first_step: int = 0,
        steps_per_epoch: int | None = None,
    ) -> None:
        self._console, self._title = console, title
        self._total, self._batch = total_steps, batch_size
        self._steps_per_epoch = steps_per_epoch
        self._step = self._window_step = first_step
        self._loss = self._eval_loss = self._accuracy = math.nan
        self._steps_per_s = self._data_wait = math.nan
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

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._live = Live(self._render(), console=self._console, auto_refresh=False, transient=True)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
            self._live.__exit__(kind, error, trace)
            self._live = None

    @contextmanager
    def finishing(self, line: str) -> Iterator[None]:
        """Show that the training is over and what is still being done."""
        if self._console.is_terminal:
            with self._console.status(line):
                yield
        else:
            print_line(self._console, line)
            yield

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        table.add_row("loss", significant(self._loss) if self._losses else "–", sparkline(self._losses))
        if not math.isnan(self._eval_loss):
            accuracy = f"accuracy {self._accuracy:.2%}" if not math.isnan(self._accuracy) else ""
            table.add_row("evaluation", significant(self._eval_loss), accuracy)
        workers = _workers(self._world) if self._world else "starting"
        if self._generation > 1:
            workers += f", generation {self._generation}"
        if self._incidents:
            workers += f", {self._incidents} incident{'s' if self._incidents > 1 else ''}"
        table.add_row("speed", self._speed() or "–", workers)
        if not math.isnan(self._data_wait):
            table.add_row("data", self._waiting(), "")
        return Group(Text(self._title, style="bold", overflow="ellipsis", no_wrap=True), self._progress, table)

    def _speed(self) -> str:
        """Empty until there has been a second of steps to measure."""
        return "" if math.isnan(self._steps_per_s) else f"{self._steps_per_s * self._batch:,.0f} samples/s"

    def _waiting(self) -> str:
        return f"{self._data_wait:.1%} of the time waited for"

    def record(self, record: TrainingRecord, world_size: int) -> None:
        """A step was committed, or an evaluation after it."""
        metrics = record.metrics
        self._world = world_size
        if isinstance(record, EvaluationRecord):
            self._eval_loss = metrics["eval/loss"]
            self._accuracy = metrics.get("eval/accuracy", math.nan)
            return
        self._step, self._loss = record.step, metrics["train/loss"]
        self._data_wait = metrics.get("perf/data_wait", self._data_wait)
        self._losses.append(self._loss)
        if len(self._losses) > 4096:
            self._losses = self._losses[::2]

    def incident(self, incident: Incident) -> None:
        """A fault was detected."""
        self._incidents += 1
        worker = f" {incident.worker}" if incident.worker else ""
        host = f" on {incident.host}" if incident.host else ""
        self.note(f"incident at step {incident.step}: {incident.kind}{worker}{host}: {incident.detail}")

    def world(self, generation: int, world_size: int, step: int) -> None:
        """A generation of `world_size` replicas was formed with `step` committed."""
        self._world, self._generation = world_size, generation
        if generation > 1:
            self.note(f"generation {generation}: {_workers(world_size)} from step {step + 1} on")

    def note(self, line: str) -> None:
        """A line that the user should read."""
        print_warning(self._console, line)

    def line(self, line: str) -> None:
        """A line that tells of something that is no cause for concern."""
        print_line(self._console, line)

    def tick(self) -> None:
        """The controller has finished one round."""
        self._draw(force=False)

    def _draw(self, force: bool) -> None:
        now = time.monotonic()
        if not force and now - self._drawn < _DRAW_EVERY_S:
            return
        self._drawn = now
        idle = not self._losses or now - self._window_at > _SAME_STEP_S
        if idle and self._step == self._window_step:
            self._window_at = now  # the speed is that of steps: other long work isn't part of it
        if now - self._window_at >= 1.0 and self._step > self._window_step:
            self._steps_per_s = (self._step - self._window_step) / (now - self._window_at)
            self._window_at, self._window_step = now, self._step
        if self._live is not None:
            self._progress.update(self._task, completed=self._step)
            self._live.update(self._render(), refresh=True)
        elif self._losses and now - self._lined >= self._line_every_s:
            self._lined, self._lined_step = now, self._step
            print_line(self._console, self._log_line())

    def _log_line(self) -> str:
        """Where the run stands, for a log."""
        parts = [f"step {self._step:,}/{self._total:,}"]
        if self._steps_per_epoch:
            parts[0] += f" (epoch {self._step / self._steps_per_epoch:.1f})"
        evaluation = ""
        if not math.isnan(self._eval_loss):
            evaluation = f", eval {significant(self._eval_loss)}"
            evaluation += f" ({self._accuracy:.2%})" if not math.isnan(self._accuracy) else ""
        parts.append(f"loss {significant(self._loss)}{evaluation}")
        if self._speed():
            parts.append(self._speed())
        if not math.isnan(self._data_wait):
            parts.append(f"data {self._waiting()}")
        parts.append(_workers(self._world))
        if self._steps_per_s > 0 and self._step < self._total:
            parts.append(f"{duration((self._total - self._step) / self._steps_per_s)} left")
        return f"{parts[0]}: {', '.join(parts[1:])}"

    @property
    def _line_every_s(self) -> float:
        return _LINE_EVERY_S if self._step != self._lined_step else _SAME_STEP_S
