"""One MLflow run per run: `Tracker` takes records, `mlflow_sink` delivers them; the only door to MLflow beside `export`."""

from service.artifacts.tracking.tracker import TerminalStatus as TerminalStatus
from service.artifacts.tracking.tracker import Tracker as Tracker
from service.artifacts.tracking.tracker import replay as replay
