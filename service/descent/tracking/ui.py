"""The MLflow UI on the embedded store."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser
from pathlib import Path
from types import FrameType

from descent.errors import ConfigError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(output_dir: Path, host: str, port: int, browser: bool) -> int:
    """Run MLflow's server on `output_dir`'s store until it is interrupted; returns its exit code.

    Raises ConfigError when there is no store, or when it would be open to others without a password.
    """
    database = output_dir / "mlflow.db"
    if not database.is_file():
        raise ConfigError(f"--output-dir={output_dir}: there are no runs here yet; descent train makes the first")
    if host not in _LOOPBACK:
        raise ConfigError(
            f"--host={host}: this server asks nobody for a password, so it stays on this machine; "
            "use an SSH tunnel, or mlflow server --app-name basic-auth"
        )
    if port == 0:
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = int(probe.getsockname()[1])
    _deliver_left_over(output_dir, database)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{database}",
        "--default-artifact-root",
        str(output_dir / "mlartifacts"),
        "--host",
        host,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # so that the server goes with us, whoever ends us
    signal.signal(signal.SIGINT, stop)
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        url = f"http://{host}:{port}"
        if not _answers(url, process):
            last = (process.stderr.read() if process.stderr else "").strip().splitlines()[-1:]
            raise ConfigError(
                f"--port={port}: the MLflow server could not start: {' '.join(last) or 'it ended'}; is the port taken?"
            )
        page = f"{url}/#/experiments/{_experiment(database)}/runs"
        print(f"MLflow UI on {page}  (Ctrl-C ends it)", flush=True)
        if browser and (os.environ.get("DISPLAY") or sys.platform == "darwin") and shutil.which("xdg-open"):
            webbrowser.open(page)
        _drain(process)
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End the server with the workers that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def _drain(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if "ERROR" in line:
            print(line.rstrip(), file=sys.stderr)


def _answers(url: str, process: subprocess.Popen[str]) -> bool:
    for _ in range(600):
        if process.poll() is not None:
            return False
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return True
        except OSError:
            time.sleep(0.1)
    return False


def _experiment(database: Path) -> str:
    """The experiment with the newest run."""
    import sqlite3

    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        row = connection.execute("SELECT experiment_id FROM runs ORDER BY start_time DESC LIMIT 1").fetchone()
    return str(row[0]) if row else "0"


def _deliver_left_over(output_dir: Path, database: Path) -> None:
    """Records that a crash left in a run's spool."""
    from descent.tracking import replay

    for spool in sorted(output_dir.glob("runs/*/spool")):
        try:
            elsewhere = json.loads((spool.parent / "run.json").read_text())["tracking_uri"]
        except (OSError, ValueError, KeyError):
            continue
        if elsewhere is not None:
            continue  # that run is kept on a server, which this isn't
        count = replay(spool, f"sqlite:///{database}")
        if count:
            print(f"delivered {count} records that {spool.parent.name} had left behind")
