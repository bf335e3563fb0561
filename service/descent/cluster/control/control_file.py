"""Two files in a run's folder: the controller writes its status into one, and reads requests to scale from the other.

Files need no port, and no rights beyond the folder's own. The controller reads requests twice a second
and writes its status once a second.
"""

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from descent.cluster.clock import SYSTEM_CLOCK, Clock
from descent.config import WorkerRange
from descent.errors import ClusterError
from descent.storage.atomic import PRIVATE, write_atomic

STATUS_FILE = "status.json"
_REQUEST_FILE = "scale.json"
_ANSWER_FILE = "scale-answer.json"
_LOOK_EVERY_S = 0.5
_SHOW_EVERY_S = 1.0
_STALE_S = 15.0


@dataclass(frozen=True)
class ScaleRequest:
    """`descent scale` wants between `low` and `high` workers."""

    number: str
    low: int
    high: int


class ControlFile:
    """The controller's side of the two files. No method raises: a folder that can't be written to ends no training."""

    def __init__(self, run_dir: Path, clock: Clock = SYSTEM_CLOCK) -> None:
        self._run_dir, self._clock = run_dir, clock
        self._looked_at = self._shown_at = 0.0
        self._shown: dict[str, Any] = {}
        for name in (_REQUEST_FILE, _ANSWER_FILE):
            with contextlib.suppress(OSError):
                (run_dir / name).unlink(missing_ok=True)  # of an earlier process of this run

    def next_request(self) -> ScaleRequest | None:
        """A request that has not been answered yet."""
        now = self._clock.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S:
            return None
        self._looked_at = now
        try:
            found = json.loads((self._run_dir / _REQUEST_FILE).read_text(encoding="utf-8"))
            (self._run_dir / _REQUEST_FILE).unlink()
            return ScaleRequest(str(found["number"]), int(found["low"]), int(found["high"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def answer(self, request: ScaleRequest, accepted: bool, message: str) -> None:
        """Answer the process that wrote the request."""
        content = {"number": request.number, "accepted": accepted, "message": message}
        with contextlib.suppress(OSError):
            _write(self._run_dir / _ANSWER_FILE, content)

    def show(self, **status: Any) -> None:
        """Write the status when it is due; at once when a state or the generation has changed."""
        now = self._clock.monotonic()
        urgent = any(status.get(k) != self._shown.get(k) for k in ("state", "controller", "generation"))
        if not urgent and now - self._shown_at < _SHOW_EVERY_S:
            return
        self._shown_at, self._shown = now, status
        with contextlib.suppress(OSError):
            _write(
                self._run_dir / STATUS_FILE,
                {
                    **status,
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "updated": self._clock.time(),
                },
            )


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(content, indent=1), mode=PRIVATE, durable=False)


def read_status(run_dir: Path) -> dict[str, Any]:
    """The status of a run. Raises ClusterError if the run isn't running."""
    try:
        status: dict[str, Any] = json.loads((run_dir / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ClusterError(f"{run_dir.name}: is not running (no {STATUS_FILE})") from error
    here = status["host"] == socket.gethostname()
    gone = not psutil.pid_exists(status["pid"]) if here else time.time() - status["updated"] > _STALE_S
    if status["state"] != "RUNNING" or gone:
        ended = status["state"] if status["state"] != "RUNNING" else "its process is gone"
        raise ClusterError(
            f"{run_dir.name}: is not running ({ended}); descent train resume={run_dir.name} goes on with it"
        )
    return status


def had_checkpoint(run_dir: Path) -> bool:
    """Whether the run's last process knew of a checkpoint; True where that can't be told."""
    try:
        status = json.loads((run_dir / STATUS_FILE).read_text(encoding="utf-8"))
        return status["checkpoint"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        return True


def ask_to_scale(run_dir: Path, workers: int | WorkerRange, wait_s: float) -> str:
    """Ask a running run for another number of workers; its answer.

    Raises ClusterError if it isn't running, refuses, or doesn't answer within `wait_s`.
    """
    read_status(run_dir)
    low, high = (workers.min, workers.max) if isinstance(workers, WorkerRange) else (1, workers)
    number = f"{os.getpid()}-{time.time_ns()}"
    _write(run_dir / _REQUEST_FILE, {"number": number, "low": low, "high": high})
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            answer = json.loads((run_dir / _ANSWER_FILE).read_text(encoding="utf-8"))
            if answer["number"] == number:
                if not answer["accepted"]:
                    raise ClusterError(f"{run_dir.name}: {answer['message']}")
                return str(answer["message"])
        read_status(run_dir)
        time.sleep(0.1)
    raise ClusterError(f"{run_dir.name}: no answer within {wait_s:g} s; is its process stopped?")
