"""What runs left behind whose process died: records that tracking doesn't have yet, a state that says RUNNING."""

import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from descent.cluster.record import run_log
from descent.cluster.run.lock import RunLock, is_locked, owner_host
from descent.errors import CheckpointError, ConfigError, TrackingError
from descent.tracking import replay

_REASON = "its process ended without a word"
_PATIENCE = 2
"""After so many runs in a row that could not be delivered, the server is taken for unreachable."""


def settle_left_over(
    output_dir: Path, tracking_uri: str | None, uri: str, *, besides: Path | None = None
) -> Iterator[str]:
    """Deliver the records that the runs under `output_dir` left in their spools, and end the runs whose process is gone.

    tracking_uri: the runs' `tracking.uri`; others are tracked elsewhere. uri: where that is.
    besides: a run that is left alone.

    Yields a line for the user about each run where there was something to do, or where something is
    wrong; such a run is passed over, and stops nothing.
    """
    failures = 0
    for spool in sorted((output_dir / "runs").glob("*/spool")):
        run_dir = spool.parent
        if run_dir == besides or is_locked(run_dir):
            continue
        try:
            saved = run_log.read_run_file(run_dir)
        except CheckpointError as error:
            yield f"passed over: {error}"
            continue
        if saved.get("tracking_uri") != tracking_uri:
            continue
        died = "state" not in saved and owner_host(run_dir) == socket.gethostname()
        refused: list[int] = []
        try:
            ended: tuple[Literal["FAILED"], int] | None = ("FAILED", _last_sign_ms(run_dir)) if died else None
            count = replay(spool, uri, ended=ended, on_refused=refused.append)
        except TrackingError as error:
            yield f"{run_dir.name}: its records could not be delivered: {error}"
            failures += 1
            if failures >= _PATIENCE:
                return
            continue
        failures = 0
        if refused:
            aside = spool / "refused.jsonl"
            yield f"{run_dir.name}: {sum(refused):,} records were refused for good; they and the reasons are in {aside}"
        if died and _mark_failed(run_dir):
            yield f"{run_dir.name}: {_REASON}; it is FAILED now, and resume={run_dir.name} goes on with it"
        elif count:
            yield f"delivered {count:,} records that {run_dir.name} had left behind"


def process_died(saved: Mapping[str, Any]) -> bool:
    """Whether the last process of a run ended without a word, so that its run.json (`saved`) has no end of its own."""
    return "state" not in saved or saved.get("reason") == _REASON


def _mark_failed(run_dir: Path) -> bool:
    """Write how the run ended to its file, unless somebody resumes it at this moment."""
    try:
        lock = RunLock(run_dir, run_dir.name)
    except ConfigError:
        return False
    try:
        saved = run_log.read_run_file(run_dir)
        if "state" not in saved:
            run_log.write_run_file(run_dir, {**saved, "state": "FAILED", "reason": _REASON})
        return True
    except (CheckpointError, OSError):
        return False
    finally:
        lock.release()


def _last_sign_ms(run_dir: Path) -> int:
    """When the run last wrote metrics, as Unix time in milliseconds."""
    metrics = run_dir / run_log.METRICS_FILE
    return int(os.stat(metrics if metrics.exists() else run_dir).st_mtime * 1000)
