"""What a run keeps beside the tracking server: its metrics line by line, its incidents, its identity.

The metrics file is what makes 'each step once' hold over resumes: it remembers which
steps were logged already, and the plots are drawn from it.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from descent.errors import CheckpointError
from descent.messages import Incident, StepRecord

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
INCIDENTS_FILE = "incidents.jsonl"


class RunLog:
    """Append-only files in the run's folder; every step and every evaluation once."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self.last_step, self.last_evaluation = 0, -1
        self.incidents: list[Incident] = []
        for record in self.records():
            self._note(record)
        self.earlier_incidents = _lines(run_dir / INCIDENTS_FILE)
        self._metrics = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        """A crash may have left half a line: end it, so that it spoils no other."""
        with (self.run_dir / METRICS_FILE).open("rb") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    self._metrics.write("\n")

    def _note(self, record: StepRecord) -> None:
        if "eval/loss" in record.metrics:
            self.last_evaluation = max(self.last_evaluation, record.step)
        else:
            self.last_step = max(self.last_step, record.step)

    def is_new(self, record: StepRecord) -> bool:
        """Whether this step (or evaluation) hasn't been logged yet."""
        if "eval/loss" in record.metrics:
            return record.step > self.last_evaluation
        return record.step > self.last_step

    def append(self, record: StepRecord) -> None:
        self._note(record)
        self._metrics.write(json.dumps([record.step, record.time_ms, record.metrics]) + "\n")

    def flush(self) -> None:
        self._metrics.flush()

    def records(self) -> Iterator[StepRecord]:
        """All records so far; a torn last line (a crash while writing) is left out."""
        path = self.run_dir / METRICS_FILE
        if not path.is_file():
            return
        with path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    step, time_ms, metrics = json.loads(line)
                except (ValueError, TypeError):
                    continue
                yield StepRecord(step, metrics, time_ms)

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
        with (self.run_dir / INCIDENTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(incident)) + "\n")

    def amend(self, index: int, incident: Incident) -> None:
        """Replace an incident of which more is known by now; the file changes in one piece."""
        self.incidents[index] = incident
        lines = [*self.earlier_incidents, *(json.dumps(asdict(i)) for i in self.incidents)]
        temporary = self.run_dir / f".{INCIDENTS_FILE}"
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        os.replace(temporary, self.run_dir / INCIDENTS_FILE)

    def close(self) -> None:
        self._metrics.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def write_run_file(run_dir: Path, content: dict[str, Any]) -> None:
    """Replace run.json in one piece."""
    temporary = run_dir / f".{RUN_FILE}"
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.chmod(0o600)  # overrides are kept as they were typed
    os.replace(temporary, run_dir / RUN_FILE)


def read_run_file(run_dir: Path) -> dict[str, Any]:
    """What `write_run_file` wrote. Raises CheckpointError if it isn't there or not whole."""
    try:
        content = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return content
    except (OSError, ValueError, AssertionError) as error:
        raise CheckpointError(f"{run_dir}: not the folder of a run: {error}") from error


def find_run(resume: str, output_dir: Path, key: str = "resume") -> Path:
    """The run's folder from its MLflow run id, its name, or its path. Raises CheckpointError."""
    path = Path(resume).expanduser()
    for candidate in (path, path.parent, path.parent.parent):
        if (candidate / RUN_FILE).is_file():
            return candidate.resolve()
    runs = output_dir / "runs"
    known = []
    for folder in sorted(runs.iterdir()) if runs.is_dir() else []:
        if (folder / RUN_FILE).is_file():
            content = read_run_file(folder)
            known.append(folder.name)
            if resume in (content.get("run_id"), folder.name):
                return folder.resolve()
    there = f"; there are: {', '.join(known[-5:])}" if known else f"; there are none in {runs}"
    raise CheckpointError(f"{key}={resume}: no run of that id, name or path{there}")
