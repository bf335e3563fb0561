"""The worker group of a run: Ray actors. It starts, polls, commands and ends them, and decides nothing."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError

from descent.cluster.workers import ray_cluster
from descent.cluster.workers.group import WorkerInfo
from descent.cluster.workers.head import Head
from descent.cluster.workers.parcel import Parcel
from descent.cluster.workers.worker import Worker
from descent.messages import Acknowledged, Fault, Membership, WorkerSpec, WorkerStatus


@dataclass
class _Handle:
    """One actor, and the poll that it has not answered yet."""

    actor: Any  # a Ray actor handle: its methods exist only remotely, so Ray types them as Any
    answered_at: float
    """Monotonic time of the last answer; before the first: of the start."""
    poll: Any = None
    """The reference of the unanswered poll."""
    unanswered_s: float = 0.0
    """Seconds since that poll was sent, without the time in which the controller was busy."""


class RayWorkerGroup:
    """All workers of a run, of every generation, as Ray actors; see `group.WorkerGroup` for what each method means."""

    def __init__(self, template: WorkerSpec, *, cpus: float, gpus: float, parcel: Parcel | None = None) -> None:
        """template: each worker's spec but for its id. cpus, gpus: of one worker. parcel: objects that all workers need."""
        self._template, self._cpus, self._gpus, self._parcel = template, cpus, gpus, parcel
        self._workers: dict[str, WorkerInfo] = {}
        self._handles: dict[str, _Handle] = {}
        self._owns_cluster = ray_cluster.is_private()
        self._head = Head()

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        return self._workers

    def start(self, count: int) -> list[str]:
        started = []
        given = [] if self._parcel is None else [self._parcel.reference()]
        for _ in range(count):
            worker_id = f"w{len(self._workers)}"
            spec = replace(self._template, worker_id=worker_id)
            # The name is for people: in Ray's dashboard, `ray list actors`, `ray kill-actor`.
            name = f"{Path(spec.run_dir).name}/{worker_id}"
            options: dict[str, Any] = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_restarts": 0}
            if not spec.loopback:  # the workers of a private cluster inherit this from the driver
                options["runtime_env"] = {"env_vars": {"PYTHONHASHSEED": "0"}}
            actor = ray.remote(Worker).options(name=name, **options).remote(spec, *given)
            self._handles[worker_id] = _Handle(actor, answered_at=time.monotonic())
            self._workers[worker_id] = WorkerInfo(worker_id)
            started.append(worker_id)
        return started

    def owns_cluster(self) -> bool:
        return self._owns_cluster

    def cluster_failure(self) -> str | None:
        if self._owns_cluster:
            return ray_cluster.private_failure()
        return "the cluster's head (Ray's GCS) doesn't answer" if self._head.lost else None

    def restart_cluster(self) -> None:
        for worker in self._workers.values():
            if not worker.dead:
                worker.dead, worker.cause, worker.excused = True, "its cluster was lost", True
        if self._parcel is not None:
            self._parcel.forget_cluster()
        ray_cluster.restart_private()
        self._head = Head()

    def room(self) -> int:
        if self.cluster_failure():
            return 0
        nothing: dict[str, float] = {}
        free = self._head.ask(ray.available_resources, nothing)
        room = float(free.get("CPU", 0)) / self._cpus
        if self._gpus:
            room = min(room, float(free.get("GPU", 0)) / self._gpus)
        return int(room + 1e-9)

    def capacity(self) -> int | None:
        return self._head.ask(lambda: ray_cluster.capacity(self._cpus, self._gpus), None)

    def kill_process(self, name: str, delay_s: float) -> None:
        process = psutil.Process() if name == "driver" else ray_cluster.private_process(name)
        # On a thread, so that it can strike anywhere in what the controller does next.
        timer = threading.Timer(delay_s, _kill, (process,))
        timer.daemon = True
        timer.start()

    def draining_nodes(self) -> set[str]:
        if self._owns_cluster and self.cluster_failure():
            return set()
        # With another cluster that is lost this is also the question that shows that its head is back.
        return self._head.ask(_draining_nodes, set())

    def poll(self, *, acknowledged: Acknowledged, reporter: str | None, wait_s: float) -> list[WorkerStatus]:
        pending = {}
        for worker_id, worker in self._workers.items():
            if worker.dead:
                continue
            handle = self._handles[worker_id]
            if handle.poll is None:
                handle.poll = handle.actor.poll.remote(acknowledged, worker_id == reporter, wait_s)
                handle.unanswered_s = 0.0
            pending[handle.poll] = worker_id
        if not pending:
            time.sleep(min(wait_s, 0.05))
            return []
        began = time.monotonic()
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=wait_s + 0.2)
        # Answers that came in the meantime are taken along without a wait of their own.
        more, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
        # Only the time of this wait counts: while the controller was busy elsewhere the answers may have
        # been there already, and no worker may be taken for dead because of that.
        waited_s = min(time.monotonic() - began, 2 * wait_s + 0.4)
        for worker_id in pending.values():
            self._handles[worker_id].unanswered_s += waited_s
        answers = ((pending[reference], self._answer(pending[reference], reference)) for reference in {*ready, *more})
        return [status for _, status in answers if status is not None]

    def _answer(self, worker_id: str, reference: Any) -> WorkerStatus | None:
        """The status that a worker has sent; None, and the worker marked as dead, where it can't send one."""
        worker, handle = self._workers[worker_id], self._handles[worker_id]
        handle.poll = None
        try:
            status: WorkerStatus = ray.get(reference, timeout=5)
        except GetTimeoutError:
            return None
        except RayError as error:
            worker.dead, worker.cause = True, _cause(error)
            worker.excused |= "node has died" in str(error)
            return None
        worker.status, handle.answered_at = status, time.monotonic()
        return status

    def since_answer_s(self, worker_id: str) -> float:
        return time.monotonic() - self._handles[worker_id].answered_at

    def unanswered_s(self, worker_id: str) -> float:
        worker, handle = self._workers[worker_id], self._handles[worker_id]
        if worker.dead or worker.status is None or handle.poll is None:
            return 0.0
        return handle.unanswered_s

    def join(self, worker_id: str, membership: Membership) -> None:
        self._handles[worker_id].actor.join.remote(membership)

    def abort(self, worker_id: str, generation: int) -> None:
        self._handles[worker_id].actor.abort.remote(generation)

    def request_pause(self, worker_id: str) -> None:
        self._handles[worker_id].actor.request_pause.remote()

    def request_checkpoint(self, worker_id: str) -> None:
        self._handles[worker_id].actor.request_checkpoint.remote()

    def inject(self, worker_id: str, fault: Fault) -> None:
        self._handles[worker_id].actor.inject.remote(fault)

    def kill(self, worker_id: str, cause: str) -> None:
        worker = self._workers[worker_id]
        worker.dead, worker.cause = True, cause
        status = worker.status
        if status is not None and status.host == socket.gethostname() and status.pid:
            # A stopped process doesn't answer Ray either; the signal reaches it at once.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(status.pid, signal.SIGKILL)
        self._end_actor(worker_id)

    def release(self, worker_id: str, cause: str) -> None:
        worker = self._workers[worker_id]
        worker.dead, worker.cause, worker.excused = True, cause, True
        self._end_actor(worker_id)

    def _end_actor(self, worker_id: str) -> None:
        if self.cluster_failure():
            return  # its workers end by themselves, and Ray would wait for a head that is gone
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self._handles[worker_id].actor, no_restart=True)

    def release_all(self) -> None:
        for worker_id, worker in self._workers.items():
            if not worker.dead:
                self.release(worker_id, "released")


def _draining_nodes() -> set[str]:
    # Ray has no public way to ask; its own Train library reads the same place.
    with contextlib.suppress(AttributeError):
        return set(ray._private.state.state.get_draining_nodes())
    return set()


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def _cause(error: BaseException) -> str:
    """One sentence for a worker's death, from what Ray's several lines tell of it."""
    text = str(error).lower()
    if "node has died" in text or "node was lost" in text:
        return "its node is gone"
    if "memory pressure" in text or "running low on memory" in text or "memory monitor" in text:
        return "ended by Ray because its node ran low on memory"
    if "ray.kill" in text or "intended_system_exit" in text or "intended_user_exit" in text:
        return "ended through Ray"
    if "exit" in text or "killed" in text or "end of file" in text:
        return "its process ended (killed, crashed or out of memory)"
    return f"can't be reached ({type(error).__name__})"
