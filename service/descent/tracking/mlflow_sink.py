"""MLflow itself: what is spooled goes in through here, and what it raises comes out as one line.

mlflow is imported inside functions: importing this module is cheap.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from descent.errors import TrackingError
from descent.tracking.delivery import Batch, Record
from descent.tracking.provenance import redact

MAX_KEY_LENGTH = 250
OPEN_TIMEOUT_S = 4
CALL_TIMEOUT_S = 20
_T = TypeVar("_T")


class MlflowSink:
    """MLflow behind `delivery.Sink`; only MlflowClient, never the process's active run."""

    def __init__(self, client: Any, run: Any) -> None:
        self._client = client
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.artifact_uri: str = run.info.artifact_uri
        self.started_ms: int = run.info.start_time
        self._params: dict[str, str] = dict(run.data.params)
        self.files = Path()

    @classmethod
    def begin(
        cls,
        uri: str,
        experiment: str,
        run_name: str,
        artifact_root: Path | None,
        run_id: str | None,
    ) -> "MlflowSink":
        """A new run, or `run_id` set back to RUNNING."""
        client = _client(uri)
        if run_id is not None:
            client.update_run(run_id, status="RUNNING")
            return cls(client, client.get_run(run_id))
        found = client.get_experiment_by_name(experiment)
        if found is None:
            embedded = artifact_root is not None and not uri.startswith(("http://", "https://"))
            location = artifact_root.absolute().as_uri() if embedded and artifact_root else None
            experiment_id = client.create_experiment(experiment, artifact_location=location)
        else:
            experiment_id = found.experiment_id
        return cls(client, client.create_run(experiment_id, run_name=run_name))

    @classmethod
    def attach(cls, uri: str, run_id: str) -> "MlflowSink":
        """An existing run, as it is."""
        client = _client(uri)
        return cls(client, client.get_run(run_id))

    def send(self, batch: Batch) -> None:
        from mlflow.entities import Metric, Param, RunTag

        tags, params = dict(batch.tags), {}
        for key, value in batch.params.items():
            if self._params.setdefault(key, value) == value:
                params[key] = value
            else:
                tags[f"resumed.{key}"[:MAX_KEY_LENGTH]] = value
        self._client.log_batch(
            self.run_id,
            metrics=[Metric(*metric) for metric in batch.metrics],
            params=[Param(key, value) for key, value in params.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )

    def perform(self, record: Record) -> None:
        match record["op"]:
            case "text":
                self._client.log_text(self.run_id, record["text"], record["path"])
            case "file":
                self._client.log_artifact(self.run_id, str(self.files / record["file"]), record["path"])
            case "dataset":
                self._client.log_inputs(self.run_id, [_dataset_input(record)])
            case "model":
                self._log_model(record)
            case "end":
                self._client.set_terminated(self.run_id, record["status"], record["time"])

    def refuses(self, error: Exception) -> bool:
        return getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")

    def _log_model(self, record: Record) -> None:
        """Upload a model directory as a logged model of the run; the same one on a retry."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        directory = self.files / record["file"]
        models = self._client.search_logged_models(
            [self.experiment_id], filter_string=f"tags.`descent.record` = '{record['id']}'"
        )
        model = (
            models[0]
            if models
            else self._client.create_logged_model(
                self.experiment_id,
                name=record["name"],
                source_run_id=self.run_id,
                tags={"descent.record": record["id"]},
            )
        )
        description = Model.load(str(directory))
        description.model_id = description.model_uuid = model.model_id
        description.run_id = self.run_id
        description.artifact_path = model.artifact_location
        description.save(str(directory / "MLmodel"))
        self._client.log_model_artifacts(model.model_id, str(directory))
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, 0)])


def _client(uri: str) -> Any:
    """An MlflowClient that says nothing, reports to nobody and gives up at the first failure."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # The courier does the waiting; MLflow's own retries would hold it for four minutes.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(uri)


def connect(uri: str, call: Callable[[], _T], timeout_s: int = OPEN_TIMEOUT_S) -> _T:
    """Run `call` against the store with a time-out; its failure as one line."""
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(timeout_s)
    try:
        return call()
    except Exception as error:  # MLflow, SQLAlchemy and the file system each have their own
        reason = _reason(error)
        advice = "start the server, or set tracking.uri=null for the embedded store"
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            advice = "check the run's id and tracking.uri"
        raise TrackingError(f"tracking.uri={redact(uri)}: {reason}; {advice}") from None
    finally:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(CALL_TIMEOUT_S)


def _reason(error: Exception) -> str:
    text = redact(" ".join(str(error).split()))
    for sign, words in (
        ("Connection refused", "connection refused"),
        ("timed out", f"no answer within {OPEN_TIMEOUT_S} s"),
        ("Name or service not known", "unknown host name"),
    ):
        if sign in text:
            return words
    return text if len(text) <= 300 else text[:300] + "…"


def _dataset_input(record: Record) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    description = dict(record["dataset"])
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
