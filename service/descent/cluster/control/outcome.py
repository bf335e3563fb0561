"""How a run ended: what `Controller.run` returns."""

from dataclasses import dataclass, field

from descent.cluster.chaos.verdict import Verdict
from descent.messages import Incident, TerminalState, WorkerFailure
from descent.storage import Location


@dataclass
class Outcome:
    """How a run ended, and the figures of its course."""

    state: TerminalState
    reason: str
    """Why it ended, where it did not reach its last step."""
    step: int
    """The last committed step."""
    failure: WorkerFailure | None = None
    """The exception that ended it, where one did."""
    checkpoint: Location | None = None
    """The newest checkpoint."""
    state_sha256: str | None = None
    """The hash of the final state, where all replicas reported the same one."""
    wall_s: float = 0.0
    useful_s: float = 0.0
    """Seconds spent in steps that were committed."""
    samples: int = 0
    """Samples of the steps that this process's part of the run has committed."""
    incidents: list[Incident] = field(default_factory=list)
    peak_rss_mb: float = 0.0
    """The largest memory of a worker's process, in MiB."""
    workers: dict[str, str] = field(default_factory=dict)
    """The last generation's workers, and the ids of the Ray nodes that they were on."""
    chaos: Verdict | None = None
    """How the run survived the faults that were injected into it."""
    unsaved_at: Location | None = None
    """The place that did not take the last checkpoint; `checkpoint` then lies in the run's own folder."""

    @property
    def goodput(self) -> float:
        """Time spent in committed steps over wall time."""
        return self.useful_s / self.wall_s if self.wall_s > 0 else 0.0
