"""MLflow itself: what is spooled goes in through here, and what it raises comes out as one line.

mlflow is imported inside functions: importing this module is cheap.
"""

import json
import logging
import os
import re
import time
import uuid
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from descent.config.secrets import without_passwords
from descent.errors import TrackingError
from descent.storage.atomic import PRIVATE, write_atomic
from descent.tracking.delivery import Batch, Record
from descent.tracking.provenance import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_KEY_LENGTH = 250
CONNECT_TIMEOUT_S = 4
CALL_TIMEOUT_S = 20
_IDENTITY_FILE = "run.json"
_MARK = "descent.mark"
_MAY_CHANGE = (401, 403, 404, 407, 408, 409, 425, 429)
"""HTTP statuses below 500 that say nothing about the values that were sent."""


@dataclass(frozen=True)
class RunIdentity:
    """Which MLflow run a spool belongs to; it is kept beside the spool, so that any later process can deliver it."""

    experiment: str = "descent"
    run_name: str = ""
    started_ms: int = 0
    """Unix time in milliseconds."""
    artifact_root: str | None = None
    """Where a new experiment of an embedded store keeps its artifacts; a server decides that itself."""
    run_id: str | None = None
    """None until the server has made the run."""
    experiment_id: str | None = None
    mark: str = ""
    """A tag of the MLflow run, by which it is found again if the answer to its creation was lost."""

    @classmethod
    def read(cls, spool_dir: Path) -> "RunIdentity | None":
        """What an earlier process noted; None where there is nothing that can be read."""
        try:
            saved = json.loads((spool_dir / _IDENTITY_FILE).read_text(encoding="utf-8"))
            return cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})
        except (OSError, ValueError, TypeError):
            return None

    def write(self, spool_dir: Path) -> None:
        """Note it for later processes."""
        write_atomic(spool_dir / _IDENTITY_FILE, json.dumps(asdict(self)), mode=PRIVATE)

    @classmethod
    def new(cls, experiment: str, run_name: str, artifact_root: Path | None) -> "RunIdentity":
        """Of a run that MLflow doesn't know yet."""
        return cls(
            experiment,
            run_name,
            int(time.time() * 1000),
            str(artifact_root.absolute()) if artifact_root else None,
            mark=uuid.uuid4().hex,
        )


class MlflowSink:
    """MLflow behind `delivery.Sink`; only MlflowClient, never the process's active run."""

    def __init__(self, uri: str, spool_dir: Path, identity: RunIdentity, *, running: bool) -> None:
        """running: whether the run is set back to RUNNING when it is reached: a process trains it."""
        self._uri, self._spool_dir, self._running = uri, spool_dir, running
        self.identity = identity
        self._client: MlflowClient | None = None
        self._params: dict[str, str] = {}

    @property
    def connected(self) -> bool:
        """Whether the server has been reached and has the run."""
        return self._client is not None

    def connect(self) -> None:
        """Reach the server, and find or make the run. Raises TrackingError, in one line."""
        if self._client is not None:
            return
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(CONNECT_TIMEOUT_S)
        try:
            client = _client(self._uri)
            if self.identity.run_id is None:
                self._make_run(client)
            elif self._running:
                client.update_run(self.identity.run_id, status="RUNNING")
            run = client.get_run(str(self.identity.run_id))
        except TrackingError:
            raise
        except Exception as error:  # MLflow, SQLAlchemy and the file system each have their own
            raise TrackingError(f"tracking.uri={redact(self._uri)}: {_reason(error)}; {_advice(error)}") from None
        finally:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(CALL_TIMEOUT_S)
        self._params = dict(run.data.params)
        self._note(replace(self.identity, experiment_id=run.info.experiment_id))
        self._client = client

    def _make_run(self, client: "MlflowClient") -> None:
        wanted = self.identity
        found = client.get_experiment_by_name(wanted.experiment)
        if found is not None and found.lifecycle_stage == "deleted":
            raise TrackingError(deleted_experiment(wanted.experiment, found.experiment_id))
        if found is None:
            embedded = wanted.artifact_root is not None and not self._uri.startswith(("http://", "https://"))
            location = Path(str(wanted.artifact_root)).as_uri() if embedded else None
            experiment_id = client.create_experiment(wanted.experiment, artifact_location=location)
        else:
            experiment_id = found.experiment_id
            marked = client.search_runs([experiment_id], filter_string=f"tags.`{_MARK}` = '{wanted.mark}'")
            if wanted.mark and marked:
                self._note(replace(wanted, run_id=marked[0].info.run_id))
                return
        run = client.create_run(
            experiment_id, start_time=wanted.started_ms, tags={_MARK: wanted.mark}, run_name=wanted.run_name
        )
        self._note(replace(wanted, run_id=run.info.run_id))

    def _note(self, identity: RunIdentity) -> None:
        if identity != self.identity:
            self.identity = identity
            identity.write(self._spool_dir)

    @property
    def _reached(self) -> "tuple[MlflowClient, str]":
        assert self._client is not None and self.identity.run_id is not None, "connect comes first"
        return self._client, self.identity.run_id

    def send(self, batch: Batch) -> None:
        """Metrics, params and tags in one call; a param that has changed becomes the tag `resumed.<key>`."""
        from mlflow.entities import Metric, Param, RunTag

        client, run_id = self._reached
        tags, params = dict(batch.tags), {}
        for key, value in batch.params.items():
            if self._params.setdefault(key, value) == value:
                params[key] = value
            else:
                tags[f"resumed.{key}"[:MAX_KEY_LENGTH]] = value
        client.log_batch(
            run_id,
            metrics=[Metric(*metric) for metric in batch.metrics],
            params=[Param(key, value) for key, value in params.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )

    def perform(self, record: Record) -> None:
        """One record of any other kind: a text, a file, a data set, the model, the end of the run."""
        client, run_id = self._reached
        match record["op"]:
            case "text":
                client.log_text(run_id, record["text"], record["path"])
            case "file":
                client.log_artifact(run_id, str(self._spool_dir / "files" / record["file"]), record["path"])
            case "dataset":
                client.log_inputs(run_id, [_dataset_input(record)])
            case "model":
                self._log_model(record)
            case "end":
                client.set_terminated(run_id, record["status"], record["time"])
            case other:
                raise TrackingError(f"a record of an unknown kind: {other}")

    def refuses(self, error: Exception) -> bool:
        """Whether MLflow itself answered that the values are wrong; a proxy's 400 doesn't count."""
        from mlflow.exceptions import RestException

        code = getattr(error, "error_code", None)
        return code == "INVALID_PARAMETER_VALUE" or (isinstance(error, RestException) and _http_status(error) == 400)

    def is_transient(self, error: Exception) -> bool:
        """Whether the same call may succeed later: no answer, a server in trouble, a missing right, a full disk."""
        import requests
        from mlflow.exceptions import MlflowException

        status = _http_status(error)
        if status is not None:
            return status >= 500 or status in _MAY_CHANGE
        if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
            return not isinstance(error, FileNotFoundError)  # of a record's own file
        if isinstance(error, MlflowException):
            # Without a status there was no answer, or MLflow's own code has refused the values.
            return error.error_code == "TEMPORARILY_UNAVAILABLE" or str(error).startswith("API request to")
        return isinstance(error, requests.RequestException)

    def probe(self) -> None:
        """Set a tag that the run has already; raises when even that fails."""
        self.send(Batch(tags={_MARK: self.identity.mark}))

    def _log_model(self, record: Record) -> None:
        """Upload a model directory as a logged model of the run, with its metrics; the same one on a retry."""
        from mlflow.entities import LoggedModelOutput, Metric
        from mlflow.models import Model

        client, run_id = self._reached
        experiment_id = str(self.identity.experiment_id)
        directory = self._spool_dir / "files" / record["file"]
        mark = {"descent.record": record["id"]}
        models = client.search_logged_models([experiment_id], filter_string=f"tags.`descent.record` = '{record['id']}'")
        model = (
            models[0]
            if models
            else client.create_logged_model(experiment_id, name=record["name"], source_run_id=run_id, tags=mark)
        )
        description = Model.load(str(directory))
        description.model_id = description.model_uuid = model.model_id
        description.run_id = run_id
        description.artifact_path = model.artifact_location
        description.save(str(directory / "MLmodel"))
        client.log_model_artifacts(model.model_id, str(directory))
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, int(record.get("step", 0)))])
        # Each is the run's own point of the same time, so that the run doesn't get it twice.
        metrics = [
            Metric(key, value, time_ms, step, model_id=model.model_id, run_id=run_id)
            for key, (value, time_ms, step) in record.get("points", {}).items()
        ]
        if metrics:
            client.log_batch(run_id, metrics=metrics)


def _http_status(error: Exception) -> int | None:
    """The HTTP status of the answer that an error is about; None where there was no answer."""
    from mlflow.exceptions import RestException

    if isinstance(error, RestException):
        return int(error.get_http_status_code())
    answer = getattr(error, "response", None)  # of requests
    if answer is not None:
        return int(answer.status_code)
    found = re.search(r"failed with error code (\d{3}) != ", str(error))  # what MLflow makes of an answer without JSON
    return int(found[1]) if found else None


def _client(uri: str) -> "MlflowClient":
    """An MlflowClient that says nothing, reports to nobody and gives up at the first failure."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # The delivery thread does the waiting; MLflow's own retries would hold it for four minutes.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(uri)


def page_of(uri: str, experiment_id: str, run_id: str) -> str | None:
    """The run's page in MLflow's UI; None for an embedded store, which has no server.

    The part after '?' opens the side of the UI that is about training, which isn't the default one.
    """
    if not uri.startswith(("http://", "https://")):
        return None
    return f"{without_passwords(uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?{TRAINING_SIDE}"


TRAINING_SIDE = "workflowType=machine_learning"


def deleted_experiment(name: str, experiment_id: str) -> str:
    """The error for an experiment in MLflow's bin."""
    return (
        f"tracking.experiment={name}: this MLflow experiment was deleted; bring it back with "
        f"mlflow experiments restore --experiment-id {experiment_id}, or use another name"
    )


def _advice(error: Exception) -> str:
    if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
        return "check the run's id and tracking.uri"
    if getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE":
        return "check the run and the experiment in MLflow's UI"
    return "start the server, or set tracking.uri=null for the embedded store"


def _reason(error: Exception) -> str:
    text = redact(" ".join(str(error).split()))
    for sign, words in (
        ("Connection refused", "connection refused"),
        ("timed out", f"no answer within {CONNECT_TIMEOUT_S} s"),
        ("Name or service not known", "unknown host name"),
    ):
        if sign in text:
            return words
    return text if len(text) <= 300 else text[:300] + "…"


def _dataset_input(record: Record) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    description: dict[str, Any] = dict(record["dataset"])
    name, digest = str(description.pop("name")), str(description.pop("digest"))
    source = redact(str(description.pop("source")))
    scheme = source.split("://")[0] if "://" in source else "local"
    dataset = Dataset(
        name=name[:500],
        digest=digest[:36],
        source_type=scheme,
        source=json.dumps({"uri": source}),
        profile=json.dumps(description, default=str),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", record["context"])])
