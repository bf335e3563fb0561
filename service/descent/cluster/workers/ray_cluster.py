"""Getting a Ray cluster: a private one on this machine, or one that is there already."""

import atexit
import contextlib
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import psutil
from filelock import FileLock, Timeout

from descent.errors import ClusterError

_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


OLDEST_RAY = (2, 52)
"""Earlier versions ignore RAY_AUTH_MODE: a private cluster could be entered without its token."""

# With this switch, which Ray has for systems whose firewalls ask about each port, a node's address
# is 127.0.0.1, and Ray's servers then listen there alone; otherwise they listen on all interfaces.
_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

_LEAVE_S = 10.0
"""How long leaving another's cluster may take."""
_SMALLEST_OBJECT_STORE = 128 << 20
_object_bytes = _SMALLEST_OBJECT_STORE
"""The size of the private cluster's memory for objects."""

_TOKEN = ""
_PREFIX, _LOCK = "descent-ray-", "in-use.lock"
_folder: Path | None = None
"""The folder of this process's private cluster: its sockets and logs, for the user alone."""
_folder_lock: FileLock | None = None
"""Held as long as the folder is in use."""

_PRIVATE: dict[str, psutil.Process] = {}
"""The processes without which the private cluster is none: name -> process. Empty where it isn't ours."""


@dataclass(frozen=True)
class Cluster:
    """What was found."""

    host: str
    """Address of this process as the workers reach it."""
    loopback: bool
    """Whether everything stays on this machine, bound to 127.0.0.1."""
    cores: float
    gpus: float
    ours: bool = True
    """Whether this run made the connection, and so ends it."""


def is_connected() -> bool:
    """Whether this process has a connection to Ray already: the user's own, which a run then shares."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(getattr(ray, "is_initialized", bool)())


def local_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def set_environment(address: str | None) -> None:
    """The variables that Ray reads, some of them when `ray` is first imported: so this comes before that import."""
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    if address is not None:
        os.environ.pop(_LOOPBACK_ONLY, None)
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = _token()
    # Inherited by the workers, so that sets of texts have one order in all of them and in every run.
    os.environ.setdefault("PYTHONHASHSEED", "0")
    os.environ[_LOOPBACK_ONLY] = "0"


def connect(address: str | None, object_bytes: int = 0) -> Cluster:
    """Start a private cluster (address None) or join the one at `address`.

    The private one listens on 127.0.0.1 alone, asks for a token that this process and its children
    have, keeps its sockets and logs in a folder that only the user can enter, and ends with
    `disconnect`. A process that is connected to Ray already keeps that connection.

    object_bytes: how much the private cluster's memory for objects must hold at least.
    Raises ClusterError if there is none at `address`, or if the installed Ray is too old.
    """
    global _object_bytes
    _refuse_old_ray(version("ray"))
    if is_connected():
        return _shared(address)
    # Half of it stays free: Ray moves objects to the disk where its memory is nearly full.
    _object_bytes = max(_SMALLEST_OBJECT_STORE, 2 * object_bytes)
    set_environment(address)
    import ray
    from ray._private import ray_constants

    if hasattr(ray_constants, "ENABLE_RAY_CLUSTER"):  # read from the environment when ray was first imported
        ray_constants.ENABLE_RAY_CLUSTER = address is not None

    # A SIGTERM often goes to the whole process group (timeout, systemd, a batch system), and so does
    # the SIGHUP of a terminal that is closed. Ray's processes inherit this mask and stay until we
    # have saved and end them ourselves.
    ours = {signal.SIGTERM, signal.SIGHUP} if address is None else set()
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, ours)
    try:
        _initialize(address)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
    if address is None:
        _PRIVATE.clear()
        children = psutil.Process().children(recursive=True)
        _PRIVATE.update({c.name(): c for c in children if c.name() in ("raylet", "gcs_server")})
    _leave_out_raylet_texts()
    total = ray.cluster_resources()
    host = "127.0.0.1" if address is None else str(ray.util.get_node_ip_address())
    return Cluster(host, address is None, float(total.get("CPU", 0)), float(total.get("GPU", 0)))


def _refuse_old_ray(installed: str) -> None:
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
    if numbers < OLDEST_RAY:
        oldest = ".".join(map(str, OLDEST_RAY))
        raise ClusterError(
            f"ray {installed}: is too old, because it lets anybody into a private cluster without its token; "
            f"Descent needs {oldest} or newer: pip install 'ray[default]>={oldest}'"
        )


def _private_folder() -> Path:
    """A folder inside a new one that only the user can enter: Ray opens its own folder to everybody.

    The path is short, because Ray puts Unix sockets into the folder.
    """
    global _folder, _folder_lock
    base = tempfile.gettempdir()
    base = base if len(base) <= 24 else "/tmp"
    _remove_left_over(Path(base))
    _folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    _folder_lock = FileLock(_folder / _LOCK, thread_local=False)
    _folder_lock.acquire()
    return _folder / "ray"


def _remove_left_over(base: Path) -> None:
    """Remove the folders of this user's processes that were killed: the kernel has released their locks."""
    for lock_file in base.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError, Timeout):
            if lock_file.parent.stat().st_uid == os.getuid():
                with FileLock(lock_file, blocking=False):
                    shutil.rmtree(lock_file.parent, ignore_errors=True)


def _remove_private_folder() -> None:
    global _folder
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)
        _folder = None
        if _folder_lock is not None:
            _folder_lock.release()


def _job_config() -> Any:
    """Keeps Ray from putting the current folder first into the import path of the workers (see `import_path.py`)."""
    from ray.job_config import JobConfig

    config = JobConfig()
    config._client_job = True  # its only other effect is on runtime environments, which a private cluster has none of
    return config


def _initialize(address: str | None) -> None:
    """Start Ray, or join it. Raises ClusterError."""
    import ray

    # Where a busy machine starts the private cluster too slowly, Ray gives up; a second try mostly succeeds.
    for last in (address is not None, True):
        try:
            if address is not None:
                ray.init(address=address, logging_level="ERROR", log_to_driver=True)
                return
            ray.init(
                address="local",
                num_cpus=local_cores(),
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(_private_folder()),
                object_store_memory=_object_bytes,
                logging_level="ERROR",
                log_to_driver=True,
                job_config=_job_config(),
            )
            return
        except Exception as error:  # Ray raises whatever occurs to it, a bare Exception included
            if not last:
                disconnect()
                continue
            where = f"ray.address={address}" if address else "a local Ray cluster"
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ClusterError(
                f"{where}: can't connect: {first}; is it running (ray status), and does RAY_AUTH_MODE fit it?"
                if address
                else f"{where}: can't start: {first}"
            ) from error


def is_private() -> bool:
    """Whether the cluster is this process's own."""
    return bool(_PRIVATE)


def private_process(name: str) -> psutil.Process:
    """The private cluster's process "raylet" or "gcs"."""
    return _PRIVATE["gcs_server" if name == "gcs" else name]


def private_failure() -> str | None:
    """Why the private cluster can't be used any more; None while it can, or where the cluster isn't private.

    An agent of Ray that dies takes its raylet with it.
    """
    for name, process in _PRIVATE.items():
        try:
            if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                continue
        except psutil.NoSuchProcess:
            pass
        return f"Ray's {name} has ended"
    return None


def restart_private() -> None:
    """End what is left of the private cluster and start it again. Raises ClusterError if that can't be done."""
    # Ray sets handlers of its own when it starts in the main thread; the run's stay in force.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    disconnect()
    connect(None, _object_bytes // 2)
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave_out_raylet_texts() -> None:
    """Keep Ray from printing a screen of advice for each worker that ends: incidents say what happened in one line.

    What workers print still comes through. Ray has no setting for this; where a later version has no
    such dispatcher, its texts appear.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

        def without_raylet(handle: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
            return lambda data: None if data.get("pid") == "raylet" else handle(data)

        with dispatcher._lock:
            dispatcher.handlers = [(name, without_raylet(handle)) for name, handle in dispatcher.handlers]


def _token() -> str:
    """One token for a process's life: Ray reads it once, and a second run in this process needs the same."""
    global _TOKEN
    _TOKEN = _TOKEN or secrets.token_hex(32)
    return _TOKEN


def _shared(address: str | None) -> Cluster:
    """The cluster that this process is connected to. Raises ClusterError if `address` names another one."""
    import ray

    here = str(ray.get_runtime_context().gcs_address)
    if address not in (None, "auto", here, f"ray://{here}"):
        raise ClusterError(
            f"ray.address={address}: this process is connected to Ray at {here} already; "
            "leave ray.address out to use that, or call ray.shutdown() first"
        )
    total = ray.cluster_resources()
    return Cluster(
        str(ray.util.get_node_ip_address()),
        False,
        float(total.get("CPU", 0)),
        float(total.get("GPU", 0)),
        ours=False,
    )


def end_with_children(exit_code: int) -> NoReturn:
    """End this process and all that it has started, at once."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for _ in range(2):  # a second look, for what was being started during the first
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    _remove_private_folder()
    os._exit(exit_code)


def disconnect() -> None:
    """Leave the cluster; a private one ends with all its processes."""
    import ray

    # Worker processes are the raylet's children, and find out by themselves that it has ended: some
    # seconds late on a busy machine. They are asked for now, while their parent still shows them.
    processes = [*_PRIVATE.values()]
    for process in _PRIVATE.values():
        with contextlib.suppress(psutil.Error):
            processes += process.children(recursive=True)
    private = bool(_PRIVATE)
    _PRIVATE.clear()
    if private:
        with contextlib.suppress(Exception):
            ray.shutdown()
    else:
        _leave()
    _, alive = psutil.wait_procs(processes, timeout=0.2)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=5.0)
    _remove_private_folder()


def _leave() -> None:
    """Leave a cluster that isn't ours; one whose head is gone is not waited for."""
    import ray

    def leave() -> None:
        with contextlib.suppress(Exception):
            ray.shutdown()

    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    leaving.join(_LEAVE_S)
    if leaving.is_alive():
        atexit.unregister(ray.shutdown)  # which would wait once more when this process ends


def capacity(cpus: float, gpus: float) -> int:
    """How many workers of this size the cluster's living nodes hold when nothing else runs."""
    import ray

    room = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            by_cpu = int(has.get("CPU", 0) / cpus + 1e-9)
            room += min(by_cpu, int(has.get("GPU", 0) / gpus + 1e-9)) if gpus > 0 else by_cpu
    return room


def check_fits(*, workers: int, cpus: float, gpus: float, wanted: str) -> None:
    """Raise ClusterError if `workers` of this size can't ever be placed on the nodes there are."""
    import ray

    room = capacity(cpus, gpus)
    if workers > room:
        nodes: list[dict[str, Any]] = [n["Resources"] for n in ray.nodes() if n["Alive"]]
        total = ", ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes)
        need = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise ClusterError(
            f"{wanted}: the cluster can place {room} workers of {need} each (it has {total}); "
            f"use workers={max(room, 1)} or smaller resources.cpus"
        )
