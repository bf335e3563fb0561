"""What is said of a run at its end: how it ended, its figures, where everything lies."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from descent.cluster.record.run_log import RunLog
from descent.messages import StepRecord

if TYPE_CHECKING:
    from descent.cluster.control.ending import Outcome


@dataclass(frozen=True)
class Summary:
    """What `descent train` says at the end."""

    run_dir: Path
    run_id: str | None
    url: str | None
    outcome: "Outcome"
    plan: dict[str, Any]
    figures: dict[str, float]
    samples_per_second: float
    undelivered: int
    tracking_uri: str
    first_step_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        o = self.outcome
        return {
            "state": str(o.state),
            "reason": o.reason,
            "step": o.step,
            "run_id": self.run_id,
            "run_dir": str(self.run_dir),
            "url": self.url,
            "tracking_uri": self.tracking_uri,
            "checkpoint": str(o.checkpoint) if o.checkpoint else None,
            "unsaved_at": str(o.unsaved_at) if o.unsaved_at else None,
            "state_sha256": o.state_sha256,
            "wall_s": o.wall_s,
            "goodput": o.goodput,
            "incidents": len(o.incidents),
            "incidents_by_kind": Counter(i.kind for i in o.incidents),
            "steps_lost": sum(i.steps_lost for i in o.incidents),
            "samples_replayed": sum(i.samples_replayed for i in o.incidents),
            "samples_per_second": self.samples_per_second,
            "first_step_s": self.first_step_s,
            "peak_rss_mb": o.peak_rss_mb,
            "workers": o.workers,
            **self.figures,
            **({"chaos": o.chaos.to_dict()} if o.chaos else {}),
        }


def figures_of(log: RunLog) -> dict[str, float]:
    """The last and the best values of what decides whether a run was any good."""
    history = log.history()
    figures: dict[str, float] = {}
    for name, best in (("eval/loss", min), ("eval/accuracy", max)):
        points = [p for p in history.get(name, []) if p[1] == p[1]]
        if points:
            figures[name] = points[-1][1]
            figures[f"best {name}"] = best(v for _, v in points)
    if history.get("train/loss"):
        figures["train/loss"] = history["train/loss"][-1][1]
    return figures


def training_s(log: RunLog, started_at: float) -> float:
    """Seconds between the first and the last step of the part of the run that began at `started_at`."""
    times = [r.time_ms for r in log.records() if isinstance(r, StepRecord) and r.time_ms >= started_at * 1000]
    return (times[-1] - times[0]) / 1000 * len(times) / (len(times) - 1) if len(times) > 1 else 0.0
