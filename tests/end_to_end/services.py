"""The parts of the deployed topology as plain processes: PostgreSQL, MLflow's server on it, a Ray head and a second node."""

import contextlib
import glob
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import debian

RAY = str(Path(sys.executable).with_name("ray"))
SMALL = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]
"""A Ray node with one CPU, for `ray start`; the process lives as long as the node."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(holds: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    """Wait until `holds()`; an AssertionError says what didn't come."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.2)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def process(
    command: list[str], log: Path, environment: dict[str, str], **options: object
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, which is gone, with its children, at the end."""
    with log.open("ab") as file:
        started = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True, **options
        )  # type: ignore[call-overload]
    try:
        yield started
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(10)


def postgres_programs() -> Path:
    """The folder of PostgreSQL's server programs; Debian's package is installed where it is missing."""
    for _ in range(2):
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
        if found:
            return Path(found[-1]).parent
        assert debian.install("postgresql"), "PostgreSQL's server is not installed: apt-get install postgresql"
    raise AssertionError("PostgreSQL was installed but its programs are not there")


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL server on a free loopback port; yields MLflow's URI for it."""
    programs, port, password = postgres_programs(), free_port(), secrets.token_hex(8)
    # A folder of its own under /tmp: pytest's can't be entered by the user that the server runs as.
    data = Path(tempfile.mkdtemp(prefix="postgres-"))
    secret = data.with_suffix(".password")
    secret.write_text(password)
    user: dict[str, object] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        for path in (data, secret):
            shutil.chown(path, "postgres", "postgres")
        user = {"user": "postgres"}
    subprocess.run(
        [programs / "initdb", "-D", data, "-U", "mlflow", "-A", "scram-sha-256", f"--pwfile={secret}"],
        check=True,
        capture_output=True,
        cwd=data,
        **user,
    )  # type: ignore[call-overload]
    command = [
        str(programs / "postgres"),
        "-D",
        str(data),
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        "-k",
        str(data),
    ]
    probe = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
    try:
        with process(command, folder / "postgres.log", {**os.environ}, cwd=data, **user):
            until(lambda: subprocess.run(probe, capture_output=True).returncode == 0, "PostgreSQL")
            yield f"postgresql://mlflow:{password}@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(data, ignore_errors=True)
        secret.unlink(missing_ok=True)


@contextlib.contextmanager
def mlflow_on(backend: str, folder: Path) -> Iterator[str]:
    """MLflow's server, which keeps the artifacts itself; yields its address."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        backend,
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    with process(
        command,
        folder / "mlflow.log",
        {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        cwd=folder,
    ):
        until(lambda: answers(f"http://127.0.0.1:{port}/health"), "the MLflow server")
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def ray_cluster(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """A Ray head and a second node, one CPU each, as `ray start` makes them; yields the Jobs API's address."""
    port, dashboard = free_port(), free_port()
    temporary = Path("/tmp") / f"ray-{secrets.token_hex(4)}"  # sockets' paths must be short
    head = [
        RAY,
        "start",
        "--head",
        f"--port={port}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={free_port()}",  # not Ray's default, which another test's cluster may have
        f"--temp-dir={temporary}",
        *SMALL,
    ]
    try:
        with process(head, folder / "head.log", environment):
            until(lambda: answers(f"http://127.0.0.1:{dashboard}/api/gcs_healthz"), "the Ray head")
            address = f"{own_address()}:{port}"
            agent = f"--dashboard-agent-listen-port={free_port()}"
            with process([RAY, "start", f"--address={address}", agent, *SMALL], folder / "node.log", environment):
                yield f"http://127.0.0.1:{dashboard}"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def own_address() -> str:
    """The address that `ray start` gives this machine."""
    import ray.util

    return str(ray.util.get_node_ip_address())
