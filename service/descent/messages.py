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


class TerminalState(StrEnum):
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
    restore_from: str | None = None
    """The checkpoint that all members begin with: each reads its share before they meet."""
    save_only: bool = False
    """Write a checkpoint and leave: too few are left to train, or the run was told to stop."""
    save_to: str | None = None
    """Where to write it, when it can't be written where the run's checkpoints belong."""


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
    loopback: bool = False
    """Whether the process group stays on this machine and may bind to loopback only."""


@dataclass(frozen=True)
class StepRecord:
    """The metrics of one committed step; every rank has the same ones."""

    step: int
    metrics: dict[str, float]
    time_ms: int
    """Unix time of the commit, in milliseconds."""


@dataclass(frozen=True)
class EvaluationRecord:
    """The metrics of an evaluation of the state that `step` committed; every rank has the same ones."""

    step: int
    metrics: dict[str, float]
    time_ms: int
    """Unix time at the end of the evaluation, in milliseconds."""


@dataclass(frozen=True)
class ClusterRecord:
    """The metrics of the cluster (world size, generation, incidents), made by the controller's process."""

    step: int
    """The last step that was committed when the metrics changed."""
    metrics: dict[str, float]
    time_ms: int
    """Unix time of the change, in milliseconds."""


TrainingRecord = StepRecord | EvaluationRecord
"""The records that workers make and the run log keeps."""
Record = StepRecord | EvaluationRecord | ClusterRecord
"""The records that tracking keeps."""


@dataclass(frozen=True)
class Acknowledged:
    """The last records that the controller has logged; workers need not keep these and earlier ones."""

    step: int
    """The step of the last StepRecord; 0 before the first."""
    evaluation: int
    """The step of the last EvaluationRecord; -1 before the first."""


@dataclass(frozen=True)
class FileWritten:
    """A file of a checkpoint that is on disk."""

    name: str
    size: int
    sha256: str
    xxh3_128: str
    """What each reading is checked against: at the speed of memory, where SHA-256 costs more than the disk."""


@dataclass(frozen=True)
class ShareWritten:
    """One rank's share of a checkpoint is on disk, or could not be written: see `error`."""

    step: int
    rank: int
    world_size: int
    generation: int
    files: tuple[FileWritten, ...] = ()
    scalars: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    stalled_s: float = 0.0
    """How long the training thread was held up for it."""
    took_s: float = 0.0
    """From the call to the last byte on disk."""


@dataclass(frozen=True)
class Notice:
    """Something that all ranks of a generation learned at the same step; each tells it, one is kept.

    kind: "step skipped" (not finite, and not when repeated either), "step repeated" (not
    finite, but finite when repeated), "diverged" (a replica's bits differ from the
    majority's), "straggler" (a rank that stays slow), "slots dealt" (anew, by speed),
    "restore failed" (a rank could not read its share of a checkpoint), "checkpoint unusable" (it
    was read and is not of this run's state), "injected" (a fault of chaos that left its worker alive).
    """

    kind: str
    step: int
    generation: int
    rank: int | None = None
    """Whom it is about, where it is about one."""
    detail: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """A fault to inject into a worker, in tests and by `descent chaos`.

    It strikes, once, when the training thread first enters `phase` of step `step` (with
    step - 1 committed; "evaluate" and "save" come after the step) or of a later one,
    `delay_s` later. kind: "kill" (SIGKILL), "segfault" (SIGSEGV),
    "stop" (SIGSTOP), "slow" (each step takes `seconds` longer, `count` times), "nan" (a
    gradient entry, once), "flip" (one bit of a parameter), "partition" (its connections to
    the other ranks are cut), "error" (an exception in the user's code), "leave" (SIGTERM).
    phase: "join", "receive", "step" (at its start), "forward", "reduce" (as the last
    backward begins and buckets travel), "update" (reduced, before the optimizer's step),
    "evaluate", "save".
    """

    kind: str
    step: int
    phase: str = "step"
    delay_s: float = 0.0
    seconds: float = 0.0
    count: int = 1


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
    records: tuple[TrainingRecord, ...] = ()
    shares: tuple[ShareWritten, ...] = ()
    notices: tuple[Notice, ...] = ()
    failure: WorkerFailure | None = None
    out_of_memory: bool = False
    """Broken because the micro-batch didn't fit: the next generation halves it."""
    broken_by: str = ""
    """What it saw of the fault, where it is broken: a collective's error, in its own words."""
    pid: int = 0
    host: str = ""
    node: str = ""
    """Ray's id of the node that it runs on."""
    peak_rss_mb: float = 0.0
    state_sha256: str | None = None
    leaving: bool = False
    """It was told (SIGTERM) that its process or node will go away soon."""
    diverged: tuple[int, ...] = ()
    """Ranks of its generation whose bits differ from the majority's; all of them where there is none."""
    useful_s: float = 0.0
    """Seconds spent in steps that were committed, since the worker's start."""


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
    """Committed steps that had to be computed again, from a checkpoint."""
    samples_replayed: int = 0
    """Samples of the interrupted step and of the lost ones."""
    detail: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
