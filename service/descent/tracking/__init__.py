"""One MLflow run per run: `Tracker` takes records, `mlflow_sink` delivers them; the only door to MLflow beside `export`."""

from descent.tracking.tracker import Point as Point
from descent.tracking.tracker import TerminalStatus as TerminalStatus
from descent.tracking.tracker import Tracker as Tracker
from descent.tracking.tracker import replay as replay
