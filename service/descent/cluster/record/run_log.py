"""What a run keeps beside the tracking server: its metrics line by line, its incidents, its identity.

The metrics file is what makes 'each step once' hold over resumes: it remembers which
steps were logged already, and the plots are drawn from it.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from descent.errors import CheckpointError
from descent.messages import Acknowledged, EvaluationRecord, Incident, StepRecord, TrainingRecord
from descent.storage.atomic import PRIVATE, write_atomic

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
INCIDENTS_FILE = "incidents.jsonl"


class RunLog:
    """Append-only files in the run's folder, with every step and every evaluation once.

    The files only record the training, so a folder that can't be written to never ends it: lines that
    don't reach the disk (it is full, say) are kept in memory and written as soon as there is room. One
    line says so, through `on_error`.
    """

    def __init__(self, run_dir: Path, on_error: Callable[[str], None] | None = None) -> None:
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self._on_error, self._error_shown = on_error or _print_error, False
        self.last_step, self.last_evaluation = 0, -1
        self.incidents: list[Incident] = []
        """Those of this process's part of the run."""
        for record in self.records():
            self._note(record)
        self.earlier_incidents = _lines(run_dir / INCIDENTS_FILE)
        # Unbuffered: after a write that the disk took in part, the rest is still known here.
        self._metrics = (run_dir / METRICS_FILE).open("ab", buffering=0)
        self._unwritten = bytearray(b"\n" if self._ends_torn() else b"")
        self._incidents_unwritten = False

    @property
    def acknowledged(self) -> Acknowledged:
        """The last records that are logged."""
        return Acknowledged(self.last_step, self.last_evaluation)

    @property
    def steps_lost(self) -> int:
        """Committed steps that had to be computed again, in all processes of this run."""
        earlier = 0
        for line in self.earlier_incidents:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                earlier += int(json.loads(line)["steps_lost"])
        return earlier + sum(incident.steps_lost for incident in self.incidents)

    def _ends_torn(self) -> bool:
        """Whether a crash has left half a line, which must be ended so that it spoils no other."""
        with (self.run_dir / METRICS_FILE).open("rb") as file:
            file.seek(0, os.SEEK_END)
            if not file.tell():
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def _note(self, record: TrainingRecord) -> None:
        if isinstance(record, EvaluationRecord):
            self.last_evaluation = max(self.last_evaluation, record.step)
        else:
            self.last_step = max(self.last_step, record.step)

    def is_new(self, record: TrainingRecord) -> bool:
        """Whether this step (or evaluation) hasn't been logged yet."""
        if isinstance(record, EvaluationRecord):
            return record.step > self.last_evaluation
        return record.step > self.last_step

    def append(self, record: TrainingRecord) -> None:
        """Log a record; `flush` writes it to the file."""
        self._note(record)
        self._unwritten += json.dumps([record.step, record.time_ms, record.metrics]).encode() + b"\n"

    def flush(self) -> None:
        """Write what isn't in the files yet. Never raises: what the disk doesn't take is tried again next time."""
        with self._best_effort():
            while self._unwritten:
                written = self._metrics.write(self._unwritten)
                del self._unwritten[:written]
        if self._incidents_unwritten:
            self._write_incidents()

    def records(self) -> Iterator[TrainingRecord]:
        """All records in the file; damaged lines, such as a last one torn by a crash, are left out."""
        path = self.run_dir / METRICS_FILE
        if not path.is_file():
            return
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    step, time_ms, metrics = json.loads(line)
                except (ValueError, TypeError):
                    continue
                if not (isinstance(step, int) and isinstance(time_ms, int) and isinstance(metrics, dict)):
                    continue
                # The file names no kinds: only an evaluation has this metric.
                kind = EvaluationRecord if "eval/loss" in metrics else StepRecord
                yield kind(step, metrics, time_ms)

    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Metric -> its points (step, value), in order."""
        self.flush()
        points: dict[str, list[tuple[int, float]]] = {}
        for record in self.records():
            for name, value in record.metrics.items():
                points.setdefault(name, []).append((record.step, value))
        return points

    def incident(self, incident: Incident) -> None:
        """Keep an incident of this process's part of the run."""
        self.incidents.append(incident)
        if self._incidents_unwritten:
            return self._write_incidents()
        with self._best_effort() as tried, (self.run_dir / INCIDENTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(incident)) + "\n")
        self._incidents_unwritten = not tried.succeeded

    def amend(self, index: int, incident: Incident) -> None:
        """Replace an incident of which more is known by now; the file changes in one piece."""
        self.incidents[index] = incident
        self._write_incidents()

    def _write_incidents(self) -> None:
        lines = [*self.earlier_incidents, *(json.dumps(asdict(i)) for i in self.incidents)]
        content = "".join(line + "\n" for line in lines)
        with self._best_effort() as tried:
            write_atomic(self.run_dir / INCIDENTS_FILE, content, mode=PRIVATE, durable=False)
        self._incidents_unwritten = not tried.succeeded

    @contextmanager
    def _best_effort(self) -> Iterator["_Tried"]:
        """Suppress an OSError; the first one is shown."""
        tried = _Tried()
        try:
            yield tried
            tried.succeeded = True
        except OSError as error:
            if not self._error_shown:
                self._error_shown = True
                self._on_error(
                    f"{self.run_dir}: can't be written to ({error.strerror or error}); training goes on, and "
                    "metrics and incidents wait in memory for room"
                )

    def close(self) -> None:
        """Write what the disk takes, and close the file."""
        self.flush()
        self._metrics.close()


@dataclass
class _Tried:
    succeeded: bool = False


def _print_error(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed terminal
        print(line, file=sys.stderr, flush=True)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def write_run_file(run_dir: Path, content: dict[str, Any]) -> None:
    """Replace run.json in one piece."""
    write_atomic(run_dir / RUN_FILE, json.dumps(content, indent=1), mode=PRIVATE)  # it holds what the user typed


def read_run_file(run_dir: Path) -> dict[str, Any]:
    """What `write_run_file` wrote. Raises CheckpointError if it isn't there or not whole."""
    try:
        content = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return _in_words_of_today(content)
    except (OSError, ValueError, AssertionError) as error:
        raise CheckpointError(f"{run_dir}: not the folder of a run: {error}") from error


def _in_words_of_today(content: dict[str, Any]) -> dict[str, Any]:
    """A run file of before: the default `slots=auto`, one slot for each worker, is `slots=workers` now."""
    config = content.get("config")
    if isinstance(config, dict) and config.get("slots") == "auto":
        overrides = content.get("overrides")
        if overrides is not None:
            overrides = [*(o for o in overrides if not o.lstrip("+").startswith("slots=")), "slots=workers"]
        return {**content, "config": {**config, "slots": "workers"}, "overrides": overrides}
    return content


def find_run(resume: str, output_dir: Path, key: str = "resume") -> Path:
    """The run's folder from its MLflow run id, its name, or its path. Raises CheckpointError."""
    path = Path(resume).expanduser()
    for candidate in (path, path.parent, path.parent.parent):
        if (candidate / RUN_FILE).is_file():
            return candidate.resolve()
    runs = output_dir / "runs"
    known, unreadable = [], []
    for folder in sorted(runs.iterdir()) if runs.is_dir() else []:
        if not (folder / RUN_FILE).is_file():
            continue
        if folder.name == resume:
            return folder.resolve()
        try:
            content = read_run_file(folder)
        except CheckpointError:  # another run's damage is no reason to stop this search
            unreadable.append(folder.name)
            continue
        known.append(folder.name)
        if content.get("run_id") == resume:
            return folder.resolve()
    there = f"; there are: {', '.join(known[-5:])}" if known else f"; there are none in {runs}"
    there += f"; passed over, because their {RUN_FILE} can't be read: {', '.join(unreadable)}" if unreadable else ""
    raise CheckpointError(f"{key}={resume}: no run of that id, name or path{there}")
