"""Small picklable values that cross processes: plain frozen dataclasses, no behaviour of note."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class WorkerState(StrEnum):
    """The state of a worker's training thread."""

    STARTING = "starting"  # imports its modules, builds the model and opens the data
    READY = "ready"  # the replica is built; the worker has been in no generation
    RUNNING = "running"  # a member of `generation`
    PAUSED = "paused"  # left its generation at the end of a step, because the members voted for a pause
    BROKEN = "broken"  # a collective failed, or the generation was aborted; the last committed state is kept
    FINISHED = "finished"  # the last step is committed and evaluated
    FAILED = "failed"  # an exception that is no lost peer: see `failure`


class TerminalState(StrEnum):
    """The terminal states of a run, in MLflow's words."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


@dataclass(frozen=True)
class Membership:
    """A worker's place in a new generation of the process group."""

    generation: int
    rank: int
    world_size: int
    store_host: str
    """Address of the store in which the members meet; the controller's process serves it."""
    store_port: int
    slots: tuple[tuple[int, int], ...]
    """For each rank the half-open range of slots that it computes."""
    micro_size: int
    """Samples in one forward and backward, the same on every rank."""
    behind: tuple[int, ...] = ()
    """The ranks that must receive the state by broadcast; rank 0 always holds the newest one."""
    restore_from: str | None = None
    """The checkpoint that all members begin with, where they do: each reads its share of it before they meet."""
    save_only: bool = False
    """Whether to write a checkpoint and leave: too few workers are left to train, or the run is to end."""
    save_to: str | None = None
    """Where to write that checkpoint, if not where the run's checkpoints belong."""


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
    """The hash that each reading is compared with: at the speed of memory, where SHA-256 is slower than the disk."""


@dataclass(frozen=True)
class ShareWritten:
    """A rank has written its share of a checkpoint, or could not: see `error`."""

    step: int
    rank: int
    world_size: int
    generation: int
    files: tuple[FileWritten, ...] = ()
    scalars: dict[str, float] = field(default_factory=dict)
    frozen: str = ""
    """The digest of the frozen parameters, where the checkpoint goes without them."""
    names: str = ""
    """The digest of the names of all tensors of the checkpoint, of whatever rank."""
    error: str | None = None
    stalled_s: float = 0.0
    """Seconds for which the training thread waited for it."""
    took_s: float = 0.0
    """Seconds from the request to the last byte on disk."""


@dataclass(frozen=True)
class Notice:
    """An event that all ranks of a generation saw at the same step; each reports it, and one report is kept.

    kind: "step skipped" (not finite, and not when repeated either), "step repeated" (not
    finite, but finite when repeated), "diverged" (a replica's bits differ from the
    majority's), "straggler" (a rank that stays slow), "slots assigned" (anew, by speed),
    "restore failed" (a rank could not read its share of a checkpoint), "checkpoint unusable" (it
    was read and is not of this run's state), "injected" (a fault of chaos that left its worker alive).
    """

    kind: str
    step: int
    generation: int
    rank: int | None = None
    """The rank that is concerned, where one is."""
    detail: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """A fault to inject into a worker, in tests and by `descent chaos`.

    It strikes once: `delay_s` seconds after the training thread first enters `phase` of step
    `step` or of a later one. In the phases "evaluate" and "save" that step is committed, in all
    others the one before. kind: "kill" (SIGKILL), "segfault" (SIGSEGV),
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
    """An exception in a worker that is no lost peer."""

    kind: str
    """The name of its class."""
    message: str
    traceback: str
    step: int
    """The last committed step when it was raised."""
    by_user: bool = True
    """Whether it is not one of Descent's own errors."""


@dataclass(frozen=True)
class WorkerStatus:
    """A worker's answer to a poll."""

    worker_id: str
    state: WorkerState
    generation: int
    step: int
    """The last step that this replica has committed."""
    evaluated: int
    """The last step whose state it has evaluated; -1 before the first evaluation."""
    phase: str
    """What the training thread is doing, such as "forward" or "reduce"."""
    phase_age_s: float
    """Seconds since the training thread entered `phase`."""
    records: tuple[TrainingRecord, ...] = ()
    shares: tuple[ShareWritten, ...] = ()
    notices: tuple[Notice, ...] = ()
    failure: WorkerFailure | None = None
    out_of_memory: bool = False
    """Whether it is broken because the micro-batch didn't fit into memory: the next generation halves it."""
    broken_by: str = ""
    """Where it is broken: the phase and the error of the collective that failed."""
    pid: int = 0
    host: str = ""
    node: str = ""
    """Ray's id of the node that the worker runs on."""
    peak_rss_mb: float = 0.0
    state_sha256: str | None = None
    leaving: bool = False
    """Whether a SIGTERM announced that its process or node will go away soon."""
    diverged: tuple[int, ...] = ()
    """Ranks of its generation whose bits differ from the majority's; all ranks where there is no majority."""
    useful_s: float = 0.0
    """Seconds spent in steps that were committed, since the worker's start."""


@dataclass(frozen=True)
class Incident:
    """A fault, and how the run survived it."""

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
