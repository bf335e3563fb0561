"""The MLflow UI on the embedded store."""

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import webbrowser
from pathlib import Path
from types import FrameType

import psutil

from descent.errors import ConfigError
from descent.tracking.mlflow_sink import TRAINING_SIDE

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(output_dir: Path, host: str, port: int, browser: bool, run_id: str | None = None) -> int:
    """Run MLflow's server on `output_dir`'s store until it is interrupted; returns its exit code.

    run_id: the run whose page is shown first. Where this folder's server is running on the port
    already, its address is printed instead.

    Raises ConfigError when there is no store, when it would be open to others without a password, or
    when another program has the port.
    """
    database = output_dir / "mlflow.db"
    if not database.is_file():
        raise ConfigError(f"--output-dir={output_dir}: there are no runs here yet; descent train makes the first")
    if host not in _LOOPBACK:
        raise ConfigError(
            f"--host={host}: this server asks nobody for a password, so it stays on this machine; "
            "use an SSH tunnel, or mlflow server --app-name basic-auth"
        )
    page = _page(database, run_id)
    if port != 0 and not _is_free(host, port):
        if _listens_for(database, port):
            print(f"MLflow UI of this folder is running already on http://{host}:{port}/{page}", flush=True)
            return 0
        raise ConfigError(
            f"--port={port}: {_holder_of(port)} has this port; use --port 0, which takes a free one, or another number"
        )
    if port == 0:
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = int(probe.getsockname()[1])

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # The server must end with this process, whichever signal ends it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    process = subprocess.Popen(
        _command(output_dir, database, host, port),
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONSAFEPATH": "1"},
        cwd=output_dir,  # so that no module of the current folder is imported in place of a library's
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        url = f"http://{host}:{port}"
        if not _answers(url, process):
            last = (process.stderr.read() if process.stderr else "").strip().splitlines()[-1:]
            raise ConfigError(f"--port={port}: the MLflow server could not start: {' '.join(last) or 'it ended'}")
        print(f"MLflow UI on {url}/{page}  (Ctrl-C ends it)", flush=True)
        if browser and (os.environ.get("DISPLAY") or sys.platform == "darwin") and shutil.which("xdg-open"):
            webbrowser.open(f"{url}/{page}")
        _print_errors(process)
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _end(process)


def _command(output_dir: Path, database: Path, host: str, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", f"sqlite:///{database}"),
        *("--default-artifact-root", str(output_dir / "mlartifacts")),
        *("--host", host, "--port", str(port), "--workers", "1"),
    ]


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a closing connection is no holder
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _holders(port: int) -> list[psutil.Process]:
    """The processes that listen on a port, as far as this user may know."""
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid is not None:
                with contextlib.suppress(psutil.Error):
                    found.append(psutil.Process(connection.pid))
    return found


def _command_lines(port: int) -> list[list[str]]:
    """Of the processes on a port and of those that started them."""
    lines = []
    for process in _holders(port):
        with contextlib.suppress(psutil.Error):
            lines += [each.cmdline() for each in (process, *process.parents())]
    return lines


def _listens_for(database: Path, port: int) -> bool:
    """Whether the server on this port shows this store."""
    return any(f"sqlite:///{database}" in line for line in _command_lines(port))


def _holder_of(port: int) -> str:
    """Who has a port, in words."""
    for line in _command_lines(port):
        for word in line:
            if word.startswith("sqlite:///"):
                return f"the MLflow UI of another folder ({Path(word.removeprefix('sqlite:///')).parent})"
    for process in _holders(port):
        with contextlib.suppress(psutil.Error):
            return f"process {process.pid} ({process.name()})"
    return "another program"


def _end(process: subprocess.Popen[str]) -> None:
    """End the server with the workers that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def _print_errors(process: subprocess.Popen[str]) -> None:
    """Until the server ends, pass on what it says is wrong."""
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


def _page(database: Path, run_id: str | None) -> str:
    """The page of a run, or of the experiment with the newest run, on the training side of MLflow's UI."""
    with sqlite3.connect(f"file:{urllib.parse.quote(str(database))}?mode=ro", uri=True) as connection:
        ask = connection.execute
        row = ask("SELECT experiment_id FROM runs WHERE run_uuid = ?", (run_id,)).fetchone()
        if run_id is not None and row is not None:
            return f"#/experiments/{row[0]}/runs/{run_id}?{TRAINING_SIDE}"
        row = ask("SELECT experiment_id FROM runs ORDER BY start_time DESC LIMIT 1").fetchone()
    return f"#/experiments/{row[0] if row else 0}/runs?{TRAINING_SIDE}"
