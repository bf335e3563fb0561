"""A replica's process as a worker: the real `WorkerProcess` behind a pipe, polled and commanded as Ray's actor is."""

import asyncio
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from descent.cluster.workers.worker import WorkerProcess
from descent.messages import Acknowledged, Fault, WorkerSpec, WorkerState
from descent.training.trainer import Trainer

_LOOK_EVERY_S = 0.005


class TestedWorker(WorkerProcess):
    """A worker with faults to come, whose trainer a test may tamper with."""

    __test__ = False

    def __init__(self, spec: WorkerSpec, faults: tuple[Fault, ...], tamper: Callable[[Any], None] | None) -> None:
        self._faults, self._tamper = faults, tamper
        super().__init__(spec)

    def _build(self) -> Trainer:
        trainer = super()._build()
        trainer.control.faults.extend(self._faults)
        if self._tamper is not None:
            self._tamper(trainer)
        return trainer


def serve(pipe: Connection, worker: TestedWorker) -> None:
    """Answer polls and follow commands until the worker is let go of."""
    poll: tuple[Acknowledged, bool, float] | None = None
    until = 0.0
    while True:
        if pipe.poll(_LOOK_EVERY_S if poll is not None else None):
            command, argument = pipe.recv()
            if command == "poll":
                poll, until = argument, time.monotonic() + argument[2]
            elif command == "let go":
                worker._memberships.put(None)
                return
            else:
                asyncio.run(getattr(worker, command)(*argument))
        if poll is not None and (worker._changed.is_set() or time.monotonic() > until):
            worker._changed.clear()
            pipe.send(worker._status(poll[0], poll[1]))
            poll = None


def wait_until_built(worker: TestedWorker) -> None:
    """Until the replica can be a member, or could not be built."""
    while worker._position[0] is WorkerState.STARTING:
        worker._changed.wait(_LOOK_EVERY_S)
