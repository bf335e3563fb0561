"""The schema of a composed configuration, typed and frozen.

Model, data sets, optimizer, schedule and loss are built from a `_target_` and stay mappings
here. Their arguments are checked when they are built, before any worker starts.
"""

import difflib
import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from descent.config.metric_names import better_direction, check_observer_name


def _has_target(value: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value.get("_target_"), str):
        raise ValueError("needs a `_target_`, the dotted path of a class")
    return value


Spec = dict[str, Any]
Renaming = dict[str, str | None]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
CLUSTER_KINDS = ("raylet", "gcs", "driver")
"""Faults that end a process of the cluster, or the driver, instead of a worker."""
CHAOS_KINDS = ("kill", "stop", "slow", "nan", "partition", "kill_in_save", *CLUSTER_KINDS)
_DURATION = re.compile(r"^(\d+(?:\.\d+)?)(s|m|h)$")
_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Section(BaseModel):
    """A group of keys. Unknown keys and wrong types are errors; no value is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class WorkerRange(Section):
    min: Positive = 1
    max: Positive

    @model_validator(mode="after")
    def _ordered(self) -> "WorkerRange":
        if self.min > self.max:
            raise ValueError(f"min={self.min} is larger than max={self.max}")
        return self


class Resources(Section):
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPU cores of one worker, and its number of threads (at least one)."""
    gpus: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = "auto"
    """GPUs of one worker: 1, or a share of one that several workers use."""


class DataCache(Section):
    """The folder in which a node keeps data that it has fetched from S3."""

    dir: str | None = None
    gb: Annotated[float, Field(gt=0)] = 20.0


class Data(BaseModel):
    """The data sets. `train` and `evaluate` are built; interpolations refer to the other keys."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: str
    train: Spec
    evaluate: Spec | None = None
    collate: Spec | None = None
    """Makes a batch of a list of samples; None: the task's own, else torch's."""
    sampler: Literal["sequential", "class_balanced", "by_length", "weighted"] | Spec | None = None
    """Which samples an epoch has; None: each of them once, shuffled."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test: Annotated[float, Field(ge=0, lt=1)] | Spec = 0.0
    """A share that is neither trained nor evaluated on, or a data set of its own: evaluated once, at the end."""
    evaluations: dict[str, Spec] = Field(default_factory=dict)
    """Further sets to evaluate, by name."""
    on_error: Literal["fail", "skip"] = "fail"
    cache: DataCache = Field(default_factory=DataCache)

    @field_validator("collate", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"_target_": value} if isinstance(value, str) else value

    @field_validator("evaluations")
    @classmethod
    def _targets(cls, value: dict[str, Spec]) -> dict[str, Spec]:
        for name, spec in value.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name):
                raise ValueError(f"{name!r} can't be the name of a set: letters, digits, '_', '.' and '-'")
            _has_target(spec)
        return value

    @field_validator("train", "evaluate", "collate", "sampler", "test")
    @classmethod
    def _target(cls, value: Spec | str | float | None) -> Spec | str | float | None:
        return _has_target(value) if isinstance(value, dict) else value


class Batch(Section):
    size: Literal["full"] | Positive
    micro_size: Literal["auto"] | Positive = "auto"


class Clip(Section):
    norm: Annotated[float, Field(gt=0)] | None = None
    value: Annotated[float, Field(gt=0)] | None = None


class EmaConfig(Section):
    decay: Annotated[float, Field(gt=0, lt=1)] | None = None


class Evaluate(Section):
    every: Literal["epoch", "end"] | Positive = "epoch"
    batch_size: Positive = 256


class KeepBest(Section):
    metric: str = "eval/loss"
    mode: Literal["min", "max"] | None = None

    @model_validator(mode="after")
    def _direction(self) -> "KeepBest":
        if not self.metric.startswith("eval/"):
            raise ValueError(
                f"metric={self.metric}: is the name of an evaluation's figure: eval/loss, eval/accuracy, eval/…"
            )
        if self.mode is None and better_direction(self.metric) is None:
            raise ValueError(f"metric={self.metric}: say whether a higher value is better, by mode: max or mode: min")
        return self

    @property
    def higher(self) -> bool:
        """Whether a higher value is better: by `mode`, or where that is None by the metric's name."""
        return (self.mode or better_direction(self.metric)) == "max"


class Stop(Section):
    """When a run ends early: after `patience` evaluations in a row without progress."""

    metric: str = "eval/loss"
    patience: Positive
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Progress is a value that is better than the best so far by more than this."""
    mode: Literal["min", "max"] | None = None

    @model_validator(mode="after")
    def _direction(self) -> "Stop":
        KeepBest(metric=self.metric, mode=self.mode)
        return self

    def is_progress(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than the best so far; NaN is not."""
        if best is None:
            return value == value
        higher = KeepBest(metric=self.metric, mode=self.mode).higher
        return value > best + self.min_delta if higher else value < best - self.min_delta


class Checkpoint(Section):
    dir: str | None = None
    every: Positive | str | None = "1m"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """With every=auto: the largest share of the running time that saving may take."""
    keep_last: Positive = 2
    keep_every: Positive | None = None
    keep_best: KeepBest | None = None
    required: bool = False
    save_frozen: Literal["auto"] | bool = "auto"

    @field_validator("every")
    @classmethod
    def _cadence(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str) and value not in ("epoch", "auto") and not _DURATION.match(value):
            raise ValueError("is a number of steps, 'epoch', a duration such as 30s, 5m, 1h, auto, or null")
        return value

    @field_validator("keep_best", mode="before")
    @classmethod
    def _metric_alone(cls, value: Any) -> Any:
        return {"metric": value} if isinstance(value, str) else value

    @field_validator("dir")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value is not None and "://" in value and not re.match(r"^s3://[^/@]+(/|$)", value):
            raise ValueError("is a folder or s3://bucket/prefix, without credentials in it")
        return value

    @property
    def every_s(self) -> float | None:
        """`every` in seconds; None for auto, infinity where `every` is not a duration."""
        if self.every == "auto":
            return None
        match = _DURATION.match(self.every) if isinstance(self.every, str) else None
        return float(match[1]) * _UNIT_S[match[2]] if match else math.inf


class Tracking(Section):
    uri: str | None = None
    experiment: str = "descent"
    every: Positive = 1
    system_metrics: bool = True

    @field_validator("uri")
    @classmethod
    def _scheme(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"^(https?|sqlite|postgresql|mysql)(\+\w+)?://", value):
            raise ValueError("is an MLflow tracking URI such as http://host:5000, or null")
        if value is not None and re.match(r"^[^:]+://[^/@]*:[^/@]*@", value):
            raise ValueError(
                "holds a password, and a config is kept in many places; use the environment: "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or PGPASSWORD"
            )
        return value


class Diagnostics(Section):
    every: Positive = 10


class Ray(Section):
    address: str | None = None


class Regroup(Section):
    heartbeat_s: Seconds = 10.0
    stall_s: Seconds = 300.0
    wait_s: Seconds = 60.0
    max_failures: Annotated[int, Field(ge=0)] = 8
    max_bad_steps: Positive = 10


class Straggler(Section):
    """Measures against a rank that is slower than the others."""

    balance: bool = True
    """Give faster ranks more slots; needs more slots than workers."""
    factor: Annotated[float, Field(gt=1)] = 1.5
    """A rank is slow if its time per sample is this many times the median of the ranks."""
    after_s: Seconds = 30.0
    """A rank that has been slow for this long becomes an incident."""
    replace: bool = False


class Chaos(Section):
    """Faults that are injected into this run, at seeded random moments."""

    faults: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0
    every_s: Seconds = 5.0
    """Mean time between two faults, in seconds."""
    kinds: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Kind of fault -> weight in the random choice."""

    @field_validator("kinds")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        for kind in value:
            if kind not in CHAOS_KINDS:
                similar = difflib.get_close_matches(kind, CHAOS_KINDS, 1)
                hint = f"did you mean {similar[0]!r}?" if similar else f"there are {', '.join(CHAOS_KINDS)}"
                raise ValueError(f"there is no fault {kind!r}; {hint}")
        return value

    @model_validator(mode="after")
    def _has_a_kind(self) -> "Chaos":
        if self.faults and not any(self.kinds.values()):
            raise ValueError(f"faults={self.faults}, but no kind has a weight above 0")
        return self


class RunConfig(Section):
    """The whole configuration of one run. The comments in configs/config.yaml say what each key does."""

    name: str | None
    output_dir: str
    steps: Positive | None
    epochs: Annotated[float, Field(gt=0)] | None
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    model: Spec
    data: Data
    loss: Spec
    task: Spec | None = None
    metrics: dict[str, Spec] = Field(default_factory=dict)
    optimizer: Spec
    schedule: Spec
    batch: Batch
    precision: Literal["fp32", "bf16", "fp16"]
    clip: Clip
    compile: bool
    ema: EmaConfig
    workers: Literal["auto"] | Positive | WorkerRange
    spares: Annotated[int, Field(ge=0)]
    slots: Literal["workers"] | Positive
    reduction: Literal["exact", "fast"]
    compress: Literal["bf16", "powersgd"] | None
    sentinel_every: Positive | None
    device: Literal["auto", "cpu", "cuda"]
    resources: Resources
    evaluate: Evaluate
    stop: Stop | None = None
    checkpoint: Checkpoint
    observers: dict[str, Spec] = Field(default_factory=dict)
    tracking: Tracking
    diagnostics: Diagnostics
    regroup: Regroup
    straggler: Straggler
    chaos: Chaos
    ray: Ray
    trusted_modules: list[str]
    init_from: str | None
    init_strict: bool
    init_key: str | None = None
    init_map: Renaming | list[str | Renaming] | None = None
    resume: str | None

    @field_validator("model", "loss", "optimizer", "schedule", "task")
    @classmethod
    def _target(cls, value: Spec | None) -> Spec | None:
        return None if value is None else _has_target(value)

    @field_validator("metrics")
    @classmethod
    def _targets(cls, value: dict[str, Spec]) -> dict[str, Spec]:
        for name, spec in value.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name):
                raise ValueError(f"{name!r} can't be a metric's name: letters, digits, '_', '.' and '-'")
            _has_target(spec)
        return value

    @field_validator("observers", mode="before")
    @classmethod
    def _paths_alone(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"_target_": spec} if isinstance(spec, str) else spec for name, spec in value.items()}

    @field_validator("observers")
    @classmethod
    def _observer_names(cls, value: dict[str, Spec]) -> dict[str, Spec]:
        for name, spec in value.items():
            check_observer_name(name)
            _has_target(spec)
        return value

    @field_validator("name")
    @classmethod
    def _file_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", value):
            raise ValueError("is used as a folder: letters, digits, '.', '_' and '-' only")
        return value

    @field_validator("init_map")
    @classmethod
    def _rules(cls, value: Renaming | list[str | Renaming] | None) -> Renaming | list[str | Renaming] | None:
        for pattern in (pattern for rules in _renamings(value) for pattern in rules):
            try:
                re.compile(pattern if pattern.startswith("^") else "")
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return value

    @field_validator("trusted_modules")
    @classmethod
    def _module_names(cls, value: list[str]) -> list[str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
                raise ValueError(f"{name!r} is not the dotted name of a module")
        return value

    @model_validator(mode="after")
    def _compressible(self) -> "RunConfig":
        if self.compress is not None and self.reduction == "exact":
            raise ValueError(
                f"compress={self.compress}: rounds the gradients, which reduction=exact does not allow; use reduction=fast"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> "RunConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps={self.steps} and epochs={self.epochs}: set one of them and the other to null")
        return self

    @property
    def init_rules(self) -> list[Renaming]:
        """`init_map` as a list of rules, which are applied one after the other."""
        return _renamings(self.init_map)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars that JSON and `RunConfig(**…)` accept."""
        return self.model_dump(mode="json")


def _renamings(value: Renaming | list[str | Renaming] | None) -> list[Renaming]:
    """
    >>> _renamings(["a. -> b.", {"c.": None}])
    [{'a.': 'b.'}, {'c.': None}]
    """
    found: list[Renaming] = []
    for rule in value if isinstance(value, list) else [value] if value else []:
        if isinstance(rule, str):
            old, arrow, new = (part.strip() for part in rule.partition("->"))
            if not arrow:
                raise ValueError(f"{rule!r} needs the form 'old -> new'")
            found.append({old: None if new == "null" else new})
        else:
            found.append(rule)
    return found


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists stay values.

    >>> flatten({"a": {"b": 1}, "c": [1, 2]})
    {'a.b': 1, 'c': [1, 2]}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat.update(flatten(value, name + "."))
        else:
            flat[name] = value
    return flat
