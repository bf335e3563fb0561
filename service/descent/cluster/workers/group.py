"""The worker actors: place, start, poll, tell, kill. It knows Ray and decides nothing."""

import contextlib
import os
import signal
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError

from descent.cluster.workers.ray_cluster import placeable
from descent.cluster.workers.worker import Worker
from descent.messages import Acknowledged, Fault, Membership, WorkerSpec, WorkerStatus


@dataclass
class Handle:
    """One actor and what was last heard of it."""

    worker_id: str
    actor: Any
    started: float
    silent_s: float = 0.0
    """How long we have listened in vain for the answer to the last question."""
    heard: float = 0.0
    """Monotonic time of the last answer (at first: of the start)."""
    answered: bool = False
    poll: Any = None
    status: WorkerStatus | None = None
    dead: bool = False
    why_dead: str = ""
    preempted: bool = False
    """It went with its node, or was told to go: nobody's fault."""

    @property
    def host(self) -> str:
        return self.status.host if self.status is not None else ""


class WorkerGroup:
    """All workers of a run, of every generation."""

    def __init__(self, template: WorkerSpec, *, cpus: float, gpus: float) -> None:
        self._template = template
        self._options: dict[str, Any] = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        if not template.loopback:  # the workers of a private cluster inherit this from the driver
            self._options["runtime_env"] = {"env_vars": {"PYTHONHASHSEED": "0"}}
        self.handles: dict[str, Handle] = {}
        self._count = 0

    def start(self, count: int) -> list[str]:
        """Ask Ray for `count` more workers; they report by themselves when they are ready."""
        started = []
        for _ in range(count):
            worker_id = f"w{self._count}"
            self._count += 1
            spec = replace(self._template, worker_id=worker_id)
            # The name is for people: in Ray's dashboard, `ray list actors`, `ray kill-actor`.
            name = f"{Path(spec.run_dir).name}/{worker_id}"
            actor = ray.remote(Worker).options(name=name, **self._options).remote(spec)
            now = time.monotonic()
            self.handles[worker_id] = Handle(worker_id, actor, now, heard=now)
            started.append(worker_id)
        return started

    def startable(self) -> int:
        """How many more workers would find room now."""
        free = ray.available_resources()
        room = float(free.get("CPU", 0)) / self._options["num_cpus"]
        if self._options["num_gpus"]:
            room = min(room, float(free.get("GPU", 0)) / self._options["num_gpus"])
        return int(room + 1e-9)

    def placeable(self) -> int:
        """How many workers of this size the cluster's nodes can hold in all."""
        return placeable(self._options["num_cpus"], self._options["num_gpus"])

    def draining(self) -> set[str]:
        """Ids of the nodes that have announced their end (a preemption, a SIGTERM, a scale-down)."""
        # Ray has no public way to ask; its own Train library reads the same place.
        with contextlib.suppress(RayError, AttributeError, RuntimeError):
            return set(ray._private.state.state.get_draining_nodes())
        return set()

    def poll(self, *, acknowledged: Acknowledged, reporter: str | None, wait_s: float) -> list[WorkerStatus]:
        """New statuses, as soon as there is one, else after about `wait_s`; notes who died."""
        pending = {}
        for handle in self.handles.values():
            if handle.dead:
                continue
            if handle.poll is None:
                handle.poll = handle.actor.poll.remote(acknowledged, handle.worker_id == reporter, wait_s)
                handle.silent_s = 0.0
            pending[handle.poll] = handle
        if not pending:
            time.sleep(min(wait_s, 0.05))
            return []
        began = time.monotonic()
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=wait_s + 0.2)
        # Whatever else is there by now comes along without a wait of its own.
        more, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
        # Only the time in which we listened counts: were we busy elsewhere for a while, the
        # answer has been lying there, and nobody may be taken for dead.
        listened = min(time.monotonic() - began, 2 * wait_s + 0.4)
        for handle in pending.values():
            handle.silent_s += listened
        statuses = []
        for reference in {*ready, *more}:
            handle = pending[reference]
            handle.poll = None
            try:
                handle.status = ray.get(reference, timeout=5)
            except (ActorDiedError, ActorUnavailableError) as error:
                handle.dead, handle.why_dead = True, _cause(error)
                handle.preempted |= "node has died" in str(error)
                continue
            except GetTimeoutError:
                continue
            except RayError as error:
                handle.dead, handle.why_dead = True, _cause(error)
                continue
            handle.heard, handle.answered = time.monotonic(), True
            assert handle.status is not None
            statuses.append(handle.status)
        return statuses

    def unheard_s(self, worker_id: str) -> float:
        """Seconds since it was last heard of."""
        return time.monotonic() - self.handles[worker_id].heard

    def silent_for(self, worker_id: str) -> float:
        """Seconds of listening to an unanswered question; 0 before the first answer ever."""
        handle = self.handles[worker_id]
        if handle.dead or handle.poll is None or not handle.answered:
            return 0.0
        return handle.silent_s

    def join(self, worker_id: str, membership: Membership) -> None:
        self.handles[worker_id].actor.join.remote(membership)

    def abort(self, worker_id: str, generation: int) -> None:
        self.handles[worker_id].actor.abort.remote(generation)

    def pause(self, worker_id: str) -> None:
        self.handles[worker_id].actor.pause.remote()

    def save(self, worker_id: str) -> None:
        self.handles[worker_id].actor.save.remote()

    def inject(self, worker_id: str, fault: Fault) -> None:
        self.handles[worker_id].actor.inject.remote(fault)

    def kill(self, worker_id: str, why: str) -> None:
        """End a worker that can't be talked to."""
        handle = self.handles[worker_id]
        handle.dead, handle.why_dead = True, why
        status = handle.status
        if status is not None and status.host == socket.gethostname() and status.pid:
            # A stopped process doesn't answer Ray either; the signal reaches it at once.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(status.pid, signal.SIGKILL)
        with contextlib.suppress(RayError, ValueError):
            ray.kill(handle.actor, no_restart=True)

    def retire(self, worker_id: str, why: str) -> None:
        """Let a worker go in the ordinary way, which Ray doesn't take for an accident."""
        handle = self.handles[worker_id]
        handle.dead, handle.why_dead, handle.preempted = True, why, True
        with contextlib.suppress(RayError, ValueError):
            ray.kill(handle.actor, no_restart=True)

    def release(self) -> None:
        """End all workers."""
        for worker_id, handle in self.handles.items():
            if not handle.dead:
                self.retire(worker_id, "released")


def _cause(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "exit" in line.lower() or "killed" in line.lower()),
        lines[0] if lines else "died",
    )[:300]
