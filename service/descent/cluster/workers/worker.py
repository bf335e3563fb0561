"""The worker actor: it trains on a thread of its own, while its event loop answers the controller.

The actor never calls another process. The controller polls it, and a poll returns early when something
has happened, so that a fault is known within milliseconds.
"""

import asyncio
import contextlib
import gc
import os
import queue
import resource
import signal
import socket
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray

from descent.cluster.workers.parcel import open_parcel
from descent.config.import_path import use_import_paths
from descent.messages import (
    Acknowledged,
    EvaluationRecord,
    Fault,
    Membership,
    Notice,
    ShareWritten,
    TrainingRecord,
    WorkerFailure,
    WorkerSpec,
    WorkerState,
    WorkerStatus,
)

if TYPE_CHECKING:
    from descent.training.trainer import Control, Trainer

_RECORDS_PER_POLL = 4000


def _bind_interface(address: str) -> None:
    """Bind the process group to the interface that the cluster knows this node by.

    Left alone, gloo takes whatever the host's own name resolves to, which on many systems
    is a loopback address that no other node can reach. What the user has set stays.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            return


class WorkerProcess:
    """One device and one replica, in a process of its own; `Worker` is the same as a Ray actor."""

    def __init__(self, spec: WorkerSpec, node: str = "", parcel: Any = None) -> None:
        """node: the cluster's id of the machine. parcel: the content of a `parcel.Parcel`, where there is one."""
        os.umask(0o077)  # a run's files are for its owner only
        use_import_paths(spec.import_paths)
        self._spec, self._node, self._parcel = spec, node, parcel
        self._position = (WorkerState.STARTING, -1)
        """(state, generation): one value, so that no poll sees the state of one generation with another's number."""
        self._failure: WorkerFailure | None = None
        self._out_of_memory = False
        self._broken_by = ""
        self._sha256: str | None = None
        self._leaving = False
        self._control: Control | None = None
        """None until the replica is built."""
        self._memberships: queue.Queue[Membership | None] = queue.Queue()
        self._changed = threading.Event()
        self._wake: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._train, name="training", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Report that this process will end soon; the controller then goes on without it."""
        self._leaving = True
        self._notify()

    # -- the training thread ----------------------------------------------------------

    def _train(self) -> None:
        try:
            trainer = self._build()
            gc.freeze()  # imports and model stay: no collection of cycles looks through them again
            self._become(WorkerState.READY)
            while (membership := self._memberships.get()) is not None:
                self._run_generation(trainer, membership)
        except BaseException as error:
            self._fail(error)

    def _build(self) -> "Trainer":
        import torch

        from descent.config import recompose
        from descent.training.plan import Plan
        from descent.training.trainer import Control, Trainer

        if self._parcel is not None:
            open_parcel(self._parcel)
            self._parcel = None  # its memory is free from now on
        plan = Plan.from_dict(self._spec.plan)
        control = self._control = Control(notify=self._notify)
        device = torch.device("cuda", 0) if plan.device == "cuda" else torch.device("cpu")
        return Trainer(recompose(self._spec.config), plan, Path(self._spec.run_dir), device, control)

    def _run_generation(self, trainer: "Trainer", membership: Membership) -> None:
        """Be a member of one generation until it ends; how it ended is the state afterwards."""
        from descent.training.checkpointing.restoring import NotRestored
        from descent.training.collectives import PeerLost
        from descent.training.trainer import OutOfMemory

        control, generation = trainer.control, membership.generation
        control.diverged = ()
        self._out_of_memory, self._broken_by = False, ""
        self._become(WorkerState.RUNNING, generation)
        try:
            outcome = trainer.run(membership)
            control.enter("finish")
            trainer.finish_saving()
            if outcome == "finished":
                self._sha256 = trainer.sha256()
            self._become(WorkerState.FINISHED if outcome == "finished" else WorkerState.PAUSED, generation)
        except OutOfMemory:
            self._out_of_memory = True
            self._become(WorkerState.BROKEN, generation)
        except (PeerLost, NotRestored) as lost:
            self._broken_by = f"in {control.phase}: {lost}"
            self._become(WorkerState.BROKEN, generation)

    def _fail(self, error: BaseException) -> None:
        from descent.errors import DescentError

        self._failure = WorkerFailure(
            kind=type(error).__name__,
            message=str(error),
            traceback="".join(traceback.format_exception(error)),
            step=self._control.step if self._control is not None else 0,
            by_user=not isinstance(error, DescentError),
        )
        self._become(WorkerState.FAILED)

    def _become(self, state: WorkerState, generation: int | None = None) -> None:
        if self._control is not None:
            self._control.enter(str(state))
        self._position = (state, self._position[1] if generation is None else generation)
        self._notify()

    def _notify(self) -> None:
        loop, wake = self._loop, self._wake
        self._changed.set()
        if loop is not None and wake is not None:
            loop.call_soon_threadsafe(wake.set)

    # -- the event loop ---------------------------------------------------------------

    async def poll(self, acknowledged: Acknowledged, with_records: bool, wait_s: float) -> WorkerStatus:
        """The worker's status, at once when something has happened since the last poll, else after `wait_s`.

        acknowledged: the records that the controller has logged; they are kept no longer.
        """
        if self._wake is None:
            self._wake, self._loop = asyncio.Event(), asyncio.get_running_loop()
        if not self._changed.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait_s)
        self._wake.clear()
        self._changed.clear()
        return self._status(acknowledged, with_records)

    def _status(self, acknowledged: Acknowledged, with_records: bool) -> WorkerStatus:
        control = self._control
        state, generation = self._position  # read first: what follows is at least as new
        records: tuple[TrainingRecord, ...] = ()
        shares: tuple[ShareWritten, ...] = ()
        notices: tuple[Notice, ...] = ()
        if control is not None:
            kept = control.records
            while kept and _is_acknowledged(kept[0], acknowledged):
                kept.popleft()
            shares = tuple(control.shares.popleft() for _ in range(len(control.shares)))
            # A state that the run goes on from must be logged before it does. This worker may be the last
            # that has the records of the state that it broadcasts, or of a checkpoint.
            if with_records or shares or state is not WorkerState.RUNNING:
                records = tuple(kept[i] for i in range(min(len(kept), _RECORDS_PER_POLL)))
            notices = tuple(control.notices.popleft() for _ in range(len(control.notices)))
        return WorkerStatus(
            worker_id=self._spec.worker_id,
            state=state,
            generation=generation,
            step=control.step if control else 0,
            evaluated=control.evaluated if control else -1,
            phase=control.phase if control else "import",
            phase_age_s=time.monotonic() - control.phase_since if control else 0.0,
            records=records,
            shares=shares,
            notices=notices,
            failure=self._failure,
            out_of_memory=self._out_of_memory,
            broken_by=self._broken_by,
            pid=os.getpid(),
            host=socket.gethostname(),
            node=self._node,
            peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            state_sha256=self._sha256,
            leaving=self._leaving,
            diverged=control.diverged if control else (),
            useful_s=control.useful_s if control else 0.0,
        )

    async def join(self, membership: Membership) -> None:
        """Become a member of a newer generation; an older one is refused."""
        if membership.generation <= self._position[1]:
            return
        if self._control is not None:
            self._control.abort.clear()
            # Here, and not when the training thread begins: a pause that is requested in between counts.
            self._control.pause = False
        self._memberships.put(membership)

    async def abort(self, generation: int) -> None:
        """Leave `generation`, or an older one, at the next slice of a wait for its peers."""
        if self._control is not None and generation >= self._position[1]:
            self._control.abort.set()

    async def request_pause(self) -> None:
        """Vote for all to stop at the step's end."""
        if self._control is not None:
            self._control.pause = True

    async def request_checkpoint(self) -> None:
        """Vote for a checkpoint at the step's end."""
        if self._control is not None:
            self._control.save = True

    async def inject(self, fault: Fault) -> None:
        """Let a fault strike this worker; refused unless the run's config asks for chaos."""
        if not self._spec.config["chaos"]["faults"]:
            raise PermissionError("chaos.faults=0: no fault is injected into this run")
        if self._control is not None:
            self._control.faults.append(fault)

    async def exit(self) -> None:
        """End the process; the training thread is a daemon."""
        os._exit(0)


def _is_acknowledged(record: TrainingRecord, acknowledged: Acknowledged) -> bool:
    if isinstance(record, EvaluationRecord):
        return record.step <= acknowledged.evaluation
    return record.step <= acknowledged.step


class Worker(WorkerProcess):
    """A worker as the Ray actor that `ray_group.RayWorkerGroup` starts: it knows its node, and a SIGTERM makes it leave."""

    def __init__(self, spec: WorkerSpec, parcel: Any = None) -> None:
        if spec.loopback:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        else:
            _bind_interface(ray.util.get_node_ip_address())
        super().__init__(spec, ray.get_runtime_context().get_node_id(), parcel)
        self._leave_on_sigterm()

    def _leave_on_sigterm(self) -> None:
        """On a SIGTERM report that this process will end soon.

        Only the main thread can set a signal handler, and an actor's code never runs there. But Ray has
        set a handler there that calls the function replaced here. Where a later Ray has no such function,
        a SIGTERM is a crash, which the others survive.
        """
        internals = ray._private.worker
        if hasattr(internals, "raise_sys_exit_with_custom_error_message"):
            internals.raise_sys_exit_with_custom_error_message = lambda *_, **__: self.leave()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
