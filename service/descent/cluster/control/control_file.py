"""A running run's folder as a door: `status.json` says how it stands, `scale.json` asks it to change its size.

Files, because they need no port and no rights beyond the folder's own. The controller
looks for a request twice a second and writes the status once a second.
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
    """Somebody wants between `low` and `high` workers."""

    number: str
    low: int
    high: int


class ControlFile:
    """The controller's side of the door."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._looked = self._shown = 0.0
        self._last: dict[str, Any] = {}
        for name in (_REQUEST_FILE, _ANSWER_FILE):
            (run_dir / name).unlink(missing_ok=True)  # of an earlier process of this run

    def asked(self) -> ScaleRequest | None:
        """A request that has not been answered yet."""
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return None
        self._looked = now
        try:
            found = json.loads((self._run_dir / _REQUEST_FILE).read_text(encoding="utf-8"))
            (self._run_dir / _REQUEST_FILE).unlink()
            return ScaleRequest(str(found["number"]), int(found["low"]), int(found["high"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def answer(self, request: ScaleRequest, accepted: bool, words: str) -> None:
        """Tell whoever asked."""
        content = {"number": request.number, "accepted": accepted, "words": words}
        _write(self._run_dir / _ANSWER_FILE, content)

    def show(self, **status: Any) -> None:
        """Write the status when it is due; at once when the state or the world has changed."""
        now = time.monotonic()
        urgent = any(status.get(k) != self._last.get(k) for k in ("state", "generation"))
        if not urgent and now - self._shown < _SHOW_EVERY_S:
            return
        self._shown, self._last = now, status
        # A full disk must not end a training; the status is then simply old.
        with contextlib.suppress(OSError):
            _write(
                self._run_dir / STATUS_FILE,
                {
                    **status,
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "updated": time.time(),
                },
            )


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(content, indent=1), mode=PRIVATE, durable=False)


def read_status(run_dir: Path) -> dict[str, Any]:
    """How a run stands. Raises ClusterError if it isn't running."""
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


def ask_to_scale(run_dir: Path, workers: int | WorkerRange, wait_s: float) -> str:
    """Ask a running run for another number of workers; what it answers.

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
                    raise ClusterError(f"{run_dir.name}: {answer['words']}")
                return str(answer["words"])
        read_status(run_dir)
        time.sleep(0.1)
    raise ClusterError(f"{run_dir.name}: no answer within {wait_s:g} s; is its process stopped?")
