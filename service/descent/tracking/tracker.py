"""One MLflow run per run, written from a background thread by way of a durable spool.

Every `log_*` appends a record to the spool and returns; `delivery.DeliveryThread` takes it from there.
Exactly once: a metric's record carries its time stamp, and (key, step, timestamp, value, run) is
the primary key of MLflow's metrics, for which its SQL stores ignore a second arrival; params and
tags are keyed by name, artifacts by path, the model by a tag. So a reply that was lost, or a
crash between delivery and acknowledgement, repeats calls but not their effect.
"""

import json
import posixpath
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from descent.errors import TrackingError
from descent.tracking.delivery import DeliveryThread, Record, TrackerStatus
from descent.tracking.mlflow_sink import (
    CALL_TIMEOUT_S,
    MAX_KEY_LENGTH,
    MlflowSink,
    connect,
)
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

TerminalStatus = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """The one writer of a run's MLflow run; make it with `Tracker.open`. Thread-safe."""

    def __init__(self, sink: MlflowSink, spool: Spool, uri: str, system_metrics: bool) -> None:
        self._sink = sink
        self._spool = spool
        self._uri = uri
        self._courier = DeliveryThread(spool, sink)
        self._unspooled: str | None = None
        self._sampler: SystemMetricsSampler | None = None
        self._courier.start()
        if system_metrics:
            self._sampler = SystemMetricsSampler(self.log_metrics, sink.started_ms, SYSTEM_METRICS_EVERY_S)
            self._sampler.start()

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
        tags: Mapping[str, str] | None = None,
        system_metrics: bool = True,
    ) -> "Tracker":
        """Start an MLflow run, or go on with `run_id`, and start delivering.

        `artifact_root`: where a new experiment of an embedded store keeps its artifacts; a
        server decides that itself. `spool_dir` belongs to this run alone; what an earlier
        process left there is delivered first. Raises `TrackingError` within about 5 s if the
        server can't be reached or refuses, if `run_id` is unknown, or if the spool is held by
        another process or can't be written.
        """
        sink = connect(uri, lambda: MlflowSink.begin(uri, experiment, run_name, artifact_root, run_id))
        try:
            spool = Spool(spool_dir)
        except (SpoolBusyError, OSError) as error:
            raise TrackingError(f"tracking: can't spool to {spool_dir}: {error}") from None
        sink.files = spool.files
        _note_run(spool_dir, sink.run_id, sink.experiment_id, uri)
        tracker = cls(sink, spool, uri, system_metrics)
        tracker.set_tags({**code_tags(), **(tags or {})})
        tracker.log_text(environment(), "environment.txt")
        return tracker

    @property
    def run_id(self) -> str:
        return self._sink.run_id

    @property
    def experiment_id(self) -> str:
        return self._sink.experiment_id

    @property
    def artifact_uri(self) -> str:
        return self._sink.artifact_uri

    @property
    def url(self) -> str | None:
        """The run's charts in MLflow's UI; None for an embedded store, which has no server."""
        if not self._uri.startswith(("http://", "https://")):
            return None
        base = redact(self._uri).rstrip("/")
        return f"{base}/#/experiments/{self.experiment_id}/runs/{self.run_id}/model-metrics"

    def log_metrics(self, step: int, metrics: Mapping[str, float], timestamp_ms: int | None = None) -> None:
        """Log values of one step. NaN is kept as NaN; ±inf becomes ±1.8e308 in MLflow's SQL."""
        now_ms = int(time.time() * 1000) if timestamp_ms is None else timestamp_ms
        values = {_fit_name(key): float(value) for key, value in metrics.items()}
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

    def log_model(self, model_dir: Path, name: str = "model") -> None:
        """Hand over a local MLflow model (see `export.save_model`); the directory is moved."""
        file = self._spool.keep_file(model_dir, move=True)
        self._append({"op": "model", "file": file, "name": name, "id": uuid.uuid4().hex})

    def status(self) -> TrackerStatus:
        delivered = self._courier.delivered
        error = self._unspooled or self._courier.last_error
        return TrackerStatus(delivered, max(0, self._spool.total - delivered), redact(error) if error else None)

    def finish(self, status: TerminalStatus, deadline_s: float) -> int:
        """Deliver all, end the MLflow run with `status`, within `deadline_s` seconds.

        Returns how many records are left in the spool, the end of the run among them;
        `replay` delivers them later.
        """
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler.join(2.0)
        self._append({"op": "end", "status": status, "time": int(time.time() * 1000)})
        if self._courier.finish(deadline_s):
            return max(0, self._spool.total - self._courier.delivered)
        return max(1, self.status().pending)

    def _append(self, record: Record) -> None:
        try:
            self._spool.append(record)
        except OSError as error:  # a full disk is no reason to stop a training: tell, go on
            self._unspooled = f"not recorded: {error}"


def replay(spool_dir: Path, uri: str) -> int:
    """Deliver what an earlier process left in `spool_dir`; returns the number of records.

    0 if there is nothing left, or if a living process holds the spool. Raises `TrackingError`
    if the server can't be reached; what was not delivered stays.
    """
    if not (spool_dir / "run.json").is_file():
        return 0
    try:
        spool = Spool(spool_dir)
    except SpoolBusyError:
        return 0
    try:
        if not spool.pending_bytes:
            return 0
        run_id = json.loads((spool_dir / "run.json").read_text())["run_id"]
        sink = connect(uri, lambda: MlflowSink.attach(uri, run_id))
        sink.files = spool.files
        courier = DeliveryThread(spool, sink)
        connect(uri, lambda: _drain(courier), CALL_TIMEOUT_S)
        return courier.delivered
    finally:
        spool.close()


def _drain(courier: DeliveryThread) -> None:
    while courier.deliver_some():
        pass


def _fit_name(name: str) -> str:
    """`name` as MLflow allows it, so that one odd name doesn't cost a batch."""
    return posixpath.normpath(_UNFIT.sub("_", name).strip("/"))[:MAX_KEY_LENGTH]


def _note_run(spool_dir: Path, run_id: str, experiment_id: str, uri: str) -> None:
    note = {"run_id": run_id, "experiment_id": experiment_id, "uri": redact(uri)}
    (spool_dir / "run.json").write_text(json.dumps(note))
