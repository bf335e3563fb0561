"""Small picklable values that cross processes: plain frozen dataclasses, no behaviour of note."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class WorkerState(StrEnum):
    """What a worker's training thread is doing, as its main thread tells it."""

    STARTING = "starting"  # imports, model, data
    READY = "ready"  # built, belongs to no generation
    RUNNING = "running"  # a member of `generation`
    PAUSED = "paused"  # left its generation at a step's end because a pause was voted
    BROKEN = "broken"  # a collective failed: waits for the next membership
    FINISHED = "finished"  # the last step is committed and evaluated
    FAILED = "failed"  # the user's code (or ours) raised: see `error`


class RunState(StrEnum):
    """The terminal states of a run, in MLflow's words."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


@dataclass(frozen=True)
class Membership:
    """One generation of the process group, as told to one of its members."""

    generation: int
    rank: int
    world_size: int
    store_host: str
    store_port: int
    slots: tuple[tuple[int, int], ...]
    """Per rank the half-open range of slots that it computes."""
    micro_size: int
    """Samples in one forward and backward, the same on every rank."""
    behind: tuple[int, ...] = ()
    """The ranks that must receive the state; rank 0 always holds the newest."""


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker needs to build its replica."""

    worker_id: str
    config: dict[str, Any]
    plan: dict[str, Any]
    """The numbers derived from config and data (see `training.plan.Plan`)."""
    run_dir: str
    import_paths: tuple[str, ...]
    device: str
    restore_from: str | None = None
    loopback: bool = False
    """Whether the process group stays on this machine and may bind to loopback only."""


@dataclass(frozen=True)
class StepRecord:
    """What is known about one committed step, the same on every rank."""

    step: int
    metrics: dict[str, float]
    time_ms: int
    """Unix time of the commit, in milliseconds."""


@dataclass(frozen=True)
class PartWritten:
    """One rank's share of a checkpoint is on disk."""

    step: int
    rank: int
    world_size: int
    generation: int
    file: str
    size: int
    sha256: str
    scalars: dict[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class WorkerFailure:
    """An exception that is not a lost peer."""

    kind: str
    message: str
    traceback: str
    step: int
    by_user: bool = True


@dataclass(frozen=True)
class WorkerStatus:
    """The answer to a poll."""

    worker_id: str
    state: WorkerState
    generation: int
    step: int
    """The last step that this replica has committed."""
    evaluated: int
    """The last step after which it has finished an evaluation."""
    phase: str
    phase_age_s: float
    """How long the training thread has been in `phase`."""
    records: tuple[StepRecord, ...] = ()
    parts: tuple[PartWritten, ...] = ()
    failure: WorkerFailure | None = None
    out_of_memory: bool = False
    """Broken because the micro-batch didn't fit: the next generation halves it."""
    pid: int = 0
    host: str = ""
    node: str = ""
    """Ray's id of the node that it runs on."""
    peak_rss_mb: float = 0.0
    state_sha256: str | None = None


@dataclass(frozen=True)
class Incident:
    """One fault and how it was survived."""

    kind: str
    step: int
    time_ms: int
    worker: str = ""
    host: str = ""
    detected_in_s: float | None = None
    recovered_in_s: float | None = None
    steps_lost: int = 0
    detail: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
