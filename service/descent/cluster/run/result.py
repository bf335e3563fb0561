"""What came of a run: how it ended, its figures, where everything lies."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from descent.cluster.record.run_log import RunLog
from descent.config.metric_names import better_direction
from descent.errors import CheckpointError, StoreError
from descent.messages import StepRecord

if TYPE_CHECKING:
    from descent.cluster.control.outcome import Outcome
    from descent.config.schema import KeepBest
    from descent.storage import Location
    from descent.tracking import Point

EXIT_CODES = {"FINISHED": 0, "FAILED": 1, "KILLED": 130}
"""Terminal state of a run -> the exit code of the command line."""


@dataclass(frozen=True)
class RunResult:
    """What came of a run; `descent.train` returns it, and `descent train` prints it.

    Times are in seconds. The metrics are those of the whole run, over all of its resumes;
    times, incidents and throughput are those of this process's part.
    """

    state: str
    """"FINISHED", "FAILED", or "KILLED": stopped by Ctrl-C or a signal, with a checkpoint."""
    step: int
    """The last committed step."""
    run_dir: Path
    reason: str = ""
    """Why the run ended before its last step; empty when it took all of its steps."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last value of `train/loss` and of each figure of the evaluations; those of the test set."""
    best: Mapping[str, float] = field(default_factory=dict)
    """The best value of `eval/loss` (lowest) and `eval/accuracy` (highest)."""
    checkpoint: str | None = None
    """The newest checkpoint: a folder, or an address on S3."""
    best_checkpoint: str | None = None
    """The kept checkpoint that is best by `checkpoint.keep_best`; None without an evaluation."""
    best_step: int | None = None
    """The step of `best_checkpoint`."""
    state_sha256: str | None = None
    """SHA-256 of the final training state: equal bits, equal hash."""
    run_id: str | None = None
    """The MLflow run; None while the tracking server has not been reached."""
    url: str | None = None
    """The run's page in MLflow's UI; None for the embedded store, which `descent ui` shows."""
    tracking_uri: str = ""
    model_uri: str | None = None
    """For `mlflow.pyfunc.load_model`; None when no model was kept."""
    start_s: float = 0.0
    """From the command to the first committed step."""
    training_s: float = 0.0
    """From the first committed step to the last, with evaluations, saves and regroups."""
    finishing_s: float = 0.0
    """From then on: the last checkpoint, plots, the model's export, delivery to tracking."""
    wall_s: float = 0.0
    """How long the controller had the run: from the start of the workers to the last checkpoint."""
    goodput: float = 0.0
    """Time in committed steps over `wall_s`."""
    samples_per_second: float = 0.0
    first_step_s: float | None = None
    incidents: int = 0
    incidents_by_kind: Mapping[str, int] = field(default_factory=dict)
    steps_lost: int = 0
    samples_replayed: int = 0
    recovery_s: tuple[float, ...] = ()
    """For each incident that interrupted a step, from its detection to the next committed step."""
    records_replaced: int = 0
    """Bad records that gave way to the next good one (data.on_error=skip)."""
    undelivered: int = 0
    """Records for tracking that still wait in the run's spool."""
    refused: int = 0
    """Records that the tracking server refused for good; they are in the spool's refused.jsonl."""
    tracking_error: str | None = None
    """Why tracking is behind, where it is."""
    unsaved_at: str | None = None
    """The place that did not take the last state, which is then in the run's own folder."""
    peak_rss_mb: float = 0.0
    workers: Mapping[str, str] = field(default_factory=dict)
    """The last generation's workers -> the Ray nodes that they were on."""
    chaos: Mapping[str, Any] | None = None
    """How the run took injected faults."""
    traceback: str = ""
    """Of the user's own code, where that ended the run."""
    already_finished: bool = False
    """Whether the run had finished before, so that a resume found nothing to train."""

    @property
    def exit_code(self) -> int:
        """0 finished, 1 failed, 130 stopped."""
        return EXIT_CODES[self.state]

    @property
    def name(self) -> str:
        """The run's name, which is its folder's too."""
        return self.run_dir.name

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: plain values; metrics stand beside the rest, with `best eval/loss` for the best ones."""
        content = asdict(self)
        best = {f"best {name}": value for name, value in content.pop("best").items()}
        figures = {**content.pop("metrics"), **best}
        if content["chaos"] is None:
            del content["chaos"]
        return {**content, "run_dir": str(self.run_dir), "recovery_s": list(self.recovery_s), **figures}

    def to_json(self) -> dict[str, Any]:
        """For the run's file; `from_json` reads it."""
        return {**asdict(self), "run_dir": str(self.run_dir), "recovery_s": list(self.recovery_s)}

    @classmethod
    def from_json(cls, run_dir: Path, saved: Mapping[str, Any]) -> "RunResult":
        """The result that a run's file holds; files of earlier versions hold less."""
        kept = {k: v for k, v in (saved.get("result") or {}).items() if k in cls.__dataclass_fields__}
        kept |= {"run_dir": run_dir, "recovery_s": tuple(kept.get("recovery_s", ()))}
        plan = saved.get("plan") or {}
        found: dict[str, Any] = {
            "state": saved.get("state", "FINISHED"),
            "step": plan.get("total_steps", 0),
            "run_id": saved.get("run_id"),
            "state_sha256": saved.get("state_sha256"),
            "tracking_uri": saved.get("tracking_uri") or "",
            **kept,
        }
        return cls(**found)


def incident_figures(outcome: "Outcome") -> dict[str, Any]:
    """The fields of a `RunResult` that count an outcome's incidents."""
    incidents = outcome.incidents
    return {
        "incidents": len(incidents),
        "incidents_by_kind": dict(Counter(i.kind for i in incidents)),
        "steps_lost": sum(i.steps_lost for i in incidents),
        "samples_replayed": sum(i.samples_replayed for i in incidents),
        "recovery_s": tuple(sorted(i.recovered_in_s for i in incidents if i.recovered_in_s is not None)),
    }


_FIRST = ("eval/loss", "eval/accuracy")


def metric_figures(log: RunLog) -> dict[str, Any]:
    """The fields of a `RunResult` that come from the run's metrics."""
    history = log.history()
    last: dict[str, float] = {}
    best: dict[str, float] = {}
    for name in sorted((n for n in history if n.startswith("eval/")), key=lambda n: (n not in _FIRST, n)):
        values = [value for _, value in history[name] if value == value]
        if values:
            last[name] = values[-1]
            if (direction := better_direction(name)) is not None:
                best[name] = max(values) if direction == "max" else min(values)
    if history.get("train/loss"):
        last["train/loss"] = history["train/loss"][-1][1]
    replaced = sum(value for _, value in history.get("data/replaced", []))
    return {"metrics": last, "best": best, "records_replaced": int(replaced)}


def last_points(log: RunLog) -> "dict[str, Point]":
    """The last logged point of each metric that says how good a model is."""
    points: dict[str, Point] = {}
    for record in log.records():
        for name in record.metrics:
            if name == "train/loss" or name.startswith("eval/"):
                points[name] = (record.metrics[name], record.time_ms, record.step)
    return points


def best_kept(root: "Location", rule: "KeepBest | None") -> tuple[str, int] | None:
    """The best of the kept checkpoints and its step; None where none has the metric, or the place can't be read."""
    from descent.checkpoint.manifest import read_manifest
    from descent.checkpoint.reader import list_checkpoints

    if rule is None:
        return None
    scored: list[tuple[float, int, str]] = []
    try:
        for target in list_checkpoints(root):
            manifest = read_manifest(target)
            score = manifest.scalars.get(rule.metric)
            if score is not None and score == score:
                scored.append((-score if rule.higher else score, manifest.step, str(target)))
    except (CheckpointError, StoreError):
        return None
    if not scored:
        return None
    _, step, place = min(scored)
    return place, step


def seconds_of_steps(log: RunLog, started_at: float) -> float:
    """Seconds between the first and the last step of the part of the run that began at `started_at` (Unix time)."""
    times = [r.time_ms for r in log.records() if isinstance(r, StepRecord) and r.time_ms >= started_at * 1000]
    return (times[-1] - times[0]) / 1000 * len(times) / (len(times) - 1) if len(times) > 1 else 0.0
