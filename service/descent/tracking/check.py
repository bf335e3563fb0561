"""Whether a run can be tracked, asked before it starts and without importing MLflow."""

import base64
import json
import os
import sqlite3
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from descent.errors import TrackingError
from descent.tracking.mlflow_sink import deleted_experiment
from descent.tracking.provenance import redact

_TIMEOUT_S = 5


def check_tracking(uri: str, experiment: str, run_id: str | None) -> None:
    """Look whether the server answers, and whether the experiment, and the run to go on with, are in use.

    Databases other than SQLite are asked nothing here. Raises TrackingError in one line.
    """
    if uri.startswith(("http://", "https://")):
        _check_server(uri, experiment, run_id)
    elif uri.startswith("sqlite:///"):
        _check_file(Path(uri.removeprefix("sqlite:///")), experiment, run_id)


def _check_server(uri: str, experiment: str, run_id: str | None) -> None:
    base = _without_user(uri)
    try:
        with urllib.request.urlopen(f"{base}/health", timeout=_TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        pass  # a server answers; the next questions show whether it is MLflow's
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TrackingError(
            f"tracking.uri={redact(uri)}: no answer ({reason}); start the server, "
            "or use tracking.uri=null for the embedded store"
        ) from error
    found = _asked(uri, "experiments/get-by-name", experiment_name=experiment)
    if found.get("experiment", {}).get("lifecycle_stage") == "deleted":
        raise TrackingError(deleted_experiment(experiment, found["experiment"]["experiment_id"]))
    if run_id is not None:
        run = _asked(uri, "runs/get", run_id=run_id)
        _check_run(run_id, run.get("run", {}).get("info", {}).get("lifecycle_stage"), missing=run == _MISSING, uri=uri)


_MISSING: dict[str, Any] = {"error_code": "RESOURCE_DOES_NOT_EXIST"}


def _asked(uri: str, what: str, **parameters: str) -> dict[str, Any]:
    """A GET of MLflow's REST API: its answer; `_MISSING` for what isn't there, {} where that can't be told.

    Raises TrackingError if the server wants other credentials.
    """
    request = urllib.request.Request(
        f"{_without_user(uri)}/api/2.0/mlflow/{what}?{urllib.parse.urlencode(parameters)}", headers=_credentials()
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            content: dict[str, Any] = json.loads(answer.read())
            return content
    except urllib.error.HTTPError as error:
        # MLflow may know credentials that aren't in the environment: its own file, or a plugin.
        elsewhere = "MLFLOW_TRACKING_AUTH" in os.environ or (Path.home() / ".mlflow" / "credentials").exists()
        if error.code in (401, 403) and not elsewhere:
            raise TrackingError(
                f"tracking.uri={redact(uri)}: the server answers {error.code} ({error.reason}); set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from None
        try:
            code = json.loads(error.read()).get("error_code")
        except (OSError, ValueError, AttributeError):
            return {}
        return _MISSING if code == _MISSING["error_code"] else {}
    except (OSError, ValueError):
        return {}


def _without_user(uri: str) -> str:
    """The address alone: urllib would take a user's name for a part of the host's."""
    parts = urllib.parse.urlsplit(uri.rstrip("/"))
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _credentials() -> dict[str, str]:
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if user is None:
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def _check_file(database: Path, experiment: str, run_id: str | None) -> None:
    if not database.is_file():
        return
    try:
        with sqlite3.connect(f"file:{urllib.parse.quote(str(database))}?mode=ro", uri=True, timeout=1.0) as connection:
            ask = connection.execute
            stage = ask(
                "SELECT lifecycle_stage, experiment_id FROM experiments WHERE name = ?", (experiment,)
            ).fetchone()
            run = ask("SELECT lifecycle_stage FROM runs WHERE run_uuid = ?", (run_id,)).fetchone() if run_id else None
    except sqlite3.Error:
        return  # locked, or not MLflow's yet: opening it will show
    if stage is not None and stage[0] == "deleted":
        raise TrackingError(deleted_experiment(experiment, str(stage[1])))
    if run_id is not None:
        _check_run(run_id, run[0] if run else None, missing=run is None, uri=f"sqlite:///{database}")


def _check_run(run_id: str, stage: str | None, *, missing: bool, uri: str) -> None:
    if missing:
        raise TrackingError(f"tracking.uri={redact(uri)}: there is no run {run_id} there; check tracking.uri")
    if stage == "deleted":
        raise TrackingError(
            f"resume: the MLflow run {run_id} was deleted; bring it back with mlflow runs restore --run-id {run_id}"
        )
