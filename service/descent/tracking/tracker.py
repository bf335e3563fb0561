"""One MLflow run per run, written from a background thread by way of a durable spool.

Every `log_*` appends a record to the spool and returns; `delivery.DeliveryThread` delivers it later.
The spool is there before the server has been reached, so that a server that is down, or that goes
away between the first check and the first step, costs no record and holds up no step.
Exactly once: a metric's record carries its time stamp, and (key, step, timestamp, value, run) is
the primary key of MLflow's metrics, for which its SQL stores ignore a second arrival; params and
tags are keyed by name, artifacts by path, the model and the run itself by a tag. So a reply that was
lost, or a crash between delivery and acknowledgement, repeats calls but not their effect.
"""

import math
import posixpath
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from descent.errors import TrackingError
from descent.tracking.delivery import FIRST_BACKOFF_S, DeliveryThread, Record, TrackerStatus
from descent.tracking.mlflow_sink import MAX_KEY_LENGTH, MlflowSink, RunIdentity, page_of
from descent.tracking.provenance import (
    code_tags,
    environment,
    flatten_params,
    is_secret,
    redact,
)
from descent.tracking.spool import Spool, SpoolBusyError
from descent.tracking.system_metrics import SystemMetricsSampler

MAX_PARAM_LENGTH = 6000  # MLflow's limits
MAX_TAG_LENGTH = 8000
SYSTEM_METRICS_EVERY_S = 10.0
_UNFIT = re.compile(r"[^\w\-. :/]")

Point = tuple[float, int, int]
"""One logged value of a metric: value, Unix time in ms, step."""
TerminalStatus = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """The one writer of a run's MLflow run; make it with `Tracker.open`, then `start`. Thread-safe."""

    def __init__(self, sink: MlflowSink, spool: Spool, uri: str) -> None:
        self._sink, self._spool, self._uri = sink, spool, uri
        self._delivery = DeliveryThread(spool, sink)
        self._unspooled: str | None = None
        self._sampler: SystemMetricsSampler | None = None
        self._infinite: set[str] = set()

    @classmethod
    def open(
        cls,
        *,
        uri: str,
        experiment: str,
        run_name: str,
        spool_dir: Path,
        artifact_root: Path | None = None,
        run_id: str | None = None,
    ) -> "Tracker":
        """Take records from now on; the server is not asked for anything before `start`.

        `run_id`: go on with this MLflow run. `artifact_root`: where a new experiment of an embedded
        store keeps its artifacts; a server decides that itself. `spool_dir` belongs to this run
        alone; what an earlier process left there is delivered first. Raises `TrackingError` if the
        spool is held by another process or can't be written.
        """
        try:
            spool = Spool(spool_dir)
            earlier = RunIdentity.read(spool_dir)
            identity = earlier or RunIdentity.new(experiment, run_name, artifact_root)
            if run_id is not None:
                identity = replace(identity, run_id=run_id)
            identity.write(spool_dir)
        except (SpoolBusyError, OSError) as error:
            raise TrackingError(f"tracking: can't spool to {spool_dir}: {error}") from None
        return cls(MlflowSink(uri, spool_dir, identity, running=True), spool, uri)

    def start(self, *, system_metrics: bool = True) -> None:
        """Begin to deliver: connect to the server, and try again for as long as that fails."""
        self.set_tags(code_tags())
        self.log_text(environment(), "environment.txt")
        self._delivery.start()
        if system_metrics:
            started_ms = self._sink.identity.started_ms or int(time.time() * 1000)
            self._sampler = SystemMetricsSampler(self.log_metrics, started_ms, SYSTEM_METRICS_EVERY_S)
            self._sampler.start()

    @property
    def connected(self) -> bool:
        """Whether the server has been reached and has the run."""
        return self._sink.connected

    def wait_until_connected(self, timeout_s: float) -> bool:
        """Wait for the server; whether it has been reached within the time."""
        deadline = time.monotonic() + timeout_s
        while not self.connected and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.connected

    @property
    def run_id(self) -> str | None:
        """The MLflow run; None until the server has been reached for the first time."""
        return self._sink.identity.run_id

    @property
    def experiment_id(self) -> str | None:
        """The MLflow experiment; None until the server has been reached for the first time."""
        return self._sink.identity.experiment_id

    @property
    def url(self) -> str | None:
        """The run's page in MLflow's UI; None without a server, or before it was reached."""
        if self.run_id is None or self.experiment_id is None:
            return None
        return page_of(self._uri, self.experiment_id, self.run_id)

    def log_metrics(self, step: int, metrics: Mapping[str, float], timestamp_ms: int | None = None) -> None:
        """Log values of one step.

        NaN stays NaN. MLflow's SQL would store ±inf as ±1.8e308, which is another number: such a value
        is left out, and the tag `descent.infinite.<key>` says at which step the first one was.
        """
        now_ms = int(time.time() * 1000) if timestamp_ms is None else timestamp_ms
        values = {_fit_name(key): float(value) for key, value in metrics.items()}
        infinite = {key: value for key, value in values.items() if math.isinf(value)}
        for key, value in infinite.items():
            del values[key]
            if key not in self._infinite:
                self._infinite.add(key)
                self.set_tags({f"descent.infinite.{key}": f"{value} at step {step}; left out from there on"})
        if values:
            self._append({"op": "batch", "step": int(step), "time": now_ms, "metrics": values})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log flat params. Secrets become ***; a value beyond MLflow's length is cut short
        there and kept whole as the artifact `params/<key>.txt`. A param of a resumed run that
        has changed can't be changed in MLflow: the new value becomes the tag `resumed.<key>`.
        """
        flat: dict[str, str] = {}
        for name, value in flatten_params(params).items():
            key = _fit_name(name)
            flat[key] = value
            if len(value) > MAX_PARAM_LENGTH:
                path = f"params/{key.replace('/', '.')}.txt"
                note = f"… (cut short: whole in {path})"
                flat[key] = value[: MAX_PARAM_LENGTH - len(note)] + note
                self.log_text(value, path)
        self._append({"op": "batch", "params": flat})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a later value replaces an earlier one. Values end at 8,000 characters."""
        fit = {
            _fit_name(key): "***" if is_secret(key) else redact(str(value))[:MAX_TAG_LENGTH]
            for key, value in tags.items()
        }
        self._append({"op": "batch", "tags": fit})

    def log_text(self, text: str, artifact_path: str) -> None:
        """Keep `text` as the artifact `artifact_path`."""
        self._append({"op": "text", "text": text, "path": artifact_path})

    def log_file(self, path: Path, artifact_dir: str | None = None) -> None:
        """Keep a file as an artifact under its name. It is copied before this returns."""
        name = self._spool.keep_file(path)
        self._append({"op": "file", "file": name, "path": artifact_dir})

    def log_dataset(self, description: Mapping[str, Any], context: Literal["training", "evaluation"]) -> None:
        """Record a data set: `name`, `digest`, `source` (path, address or package), and
        anything else (number of samples, shapes), which becomes its profile in MLflow.
        """
        assert {"name", "digest", "source"} <= set(description), description
        self._append({"op": "dataset", "dataset": dict(description), "context": context})

    def log_model(self, model_dir: Path, name: str, step: int, points: Mapping[str, Point]) -> None:
        """Hand over a local MLflow model (see `export.save_model`); the directory is moved.

        `name`: without any of / : . % " '. `step`: of the model's state. `points`: metric -> the logged
        point that tells how good the model is; it must be logged exactly so, or the run has it twice.
        """
        file = self._spool.keep_file(model_dir, move=True)
        kept = {_fit_name(key): list(point) for key, point in points.items() if math.isfinite(point[0])}
        self._append({"op": "model", "file": file, "id": uuid.uuid4().hex, "name": name, "step": step, "points": kept})

    def status(self) -> TrackerStatus:
        """How delivery stands."""
        delivered, since = self._delivery.delivered, self._delivery.failing_since
        error = self._unspooled or self._delivery.last_error
        return TrackerStatus(
            delivered,
            max(0, self._spool.total - delivered),
            self._delivery.refused,
            redact(error) if error else None,
            time.monotonic() - since if since is not None else 0.0,
        )

    def finish(self, status: TerminalStatus, deadline_s: float) -> int:
        """Deliver all, end the MLflow run with `status`, within `deadline_s` seconds.

        Returns how many records are left in the spool, the end of the run among them;
        `replay` delivers them later.
        """
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler.join(2.0)
        self._append({"op": "end", "status": status, "time": int(time.time() * 1000)})
        if self._delivery.finish(deadline_s):
            return max(0, self._spool.total - self._delivery.delivered)
        return max(1, self.status().pending)

    def discard(self) -> None:
        """Give up a tracker that was never started: nothing was delivered, and nothing will be."""
        self._spool.delete()

    def _append(self, record: Record) -> None:
        try:
            self._spool.append(record)
        except OSError as error:  # a full disk is no reason to stop a training
            self._unspooled = f"not recorded: {error}"


def replay(
    spool_dir: Path,
    uri: str,
    *,
    ended: tuple[TerminalStatus, int] | None = None,
    on_refused: Callable[[int], None] = lambda _: None,
) -> int:
    """Deliver what an earlier process left in `spool_dir`; returns the number of records.

    ended: (status, Unix time in ms) of a run whose process died before it could say how it ended.
    on_refused: called with the number of records that were set aside, if there are any.

    0 if there is nothing left, or if a living process holds the spool. Raises `TrackingError`
    if the server can't be reached or the spool can't be read; what was not delivered stays.
    """
    identity = RunIdentity.read(spool_dir)
    if identity is None:
        if (spool_dir / "records.jsonl").is_file() and (spool_dir / "records.jsonl").stat().st_size:
            raise TrackingError(f"{spool_dir}: holds records, but run.json doesn't say of which MLflow run")
        return 0
    try:
        spool = Spool(spool_dir)
    except SpoolBusyError:
        return 0
    except OSError as error:
        raise TrackingError(f"{spool_dir}: can't be read: {error}") from None
    try:
        if ended is not None and (spool.pending_bytes or identity.run_id is not None):
            spool.append({"op": "end", "status": ended[0], "time": ended[1]})
        if not spool.pending_bytes:
            return 0
        delivery = DeliveryThread(spool, MlflowSink(uri, spool_dir, identity, running=False))
        while True:
            try:
                if not delivery.deliver_some():
                    break
            except Exception as error:  # MLflow, SQLAlchemy and the file system each have their own
                if delivery.in_doubt:  # a record that fails for a reason of its own keeps no others back
                    time.sleep(FIRST_BACKOFF_S)
                    continue
                if isinstance(error, TrackingError):
                    raise
                line = " ".join(str(error).split())[:300]
                raise TrackingError(f"tracking.uri={redact(uri)}: {redact(line)}") from None
        if delivery.refused:
            on_refused(delivery.refused)
        return delivery.delivered
    finally:
        spool.close()


def _fit_name(name: str) -> str:
    """`name` as MLflow allows it, so that one odd name doesn't cost a batch."""
    return posixpath.normpath(_UNFIT.sub("_", name).strip("/"))[:MAX_KEY_LENGTH]
