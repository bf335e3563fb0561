"""Real processes, real gloo, no Ray: replicas that are led through generations over pipes.

Processes come from a fork server that has imported torch once, and live for many cases:
a case costs a new generation of the one store, not a new interpreter.
"""

import dataclasses
import faulthandler
import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from descent.config import RunConfig, compose, recompose
from descent.messages import Fault, Membership, Notice, ShareWritten, TrainingRecord, WorkerSpec
from descent.training.collectives import Store
from descent.training.faults import PHASES
from descent.training.plan import Plan, prepare
from descent.training.slot_balancer import assign_slots

DEADLINE_S = 120.0
"""Longer than anything here takes on a busy machine: a hang fails, slowness doesn't."""
_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.distributed.preload", "descent.training.trainer", "descent.data.digits"])


@dataclasses.dataclass(frozen=True)
class Injected:
    """A fault and the worker that it strikes, built as a sentence: `fail(worker=1).at(step=7, phase="reduce")`."""

    worker: int
    fault: Fault

    def at(self, step: int, phase: str = "step", delay_s: float = 0.0) -> "Injected":
        """In this phase of this step, a moment after the training thread has entered it."""
        assert phase in PHASES, phase
        fault = dataclasses.replace(self.fault, step=step, phase=phase, delay_s=delay_s)
        return Injected(self.worker, fault)

    def __str__(self) -> str:
        f = self.fault
        later = f"+{1000 * f.delay_s:g}ms" if f.delay_s else ""
        return f"{f.kind}-w{self.worker}-{f.phase}{f.step}{later}"


def _injected(worker: int, kind: str, **given: Any) -> Injected:
    return Injected(worker, Fault(kind, 0, **given))


def fail(worker: int) -> Injected:
    """SIGKILL."""
    return _injected(worker, "kill")


def crash(worker: int) -> Injected:
    """SIGSEGV."""
    return _injected(worker, "segfault")


def hang(worker: int) -> Injected:
    """SIGSTOP: no error comes back from it."""
    return _injected(worker, "stop")


def leave(worker: int) -> Injected:
    """SIGTERM: its node goes away soon."""
    return _injected(worker, "leave")


def cut(worker: int) -> Injected:
    """Its connections to the others end; it lives."""
    return _injected(worker, "partition")


def slow_down(worker: int, seconds: float, count: int) -> Injected:
    """Each of `count` steps takes `seconds` longer."""
    return _injected(worker, "slow", seconds=seconds, count=count)


def poison(worker: int) -> Injected:
    """A NaN in its gradient, once."""
    return _injected(worker, "nan")


def flip_a_bit(worker: int) -> Injected:
    """A parameter's bit turns over in its memory."""
    return _injected(worker, "flip")


def blunder(worker: int) -> Injected:
    """An exception in the user's code."""
    return _injected(worker, "error")


@dataclasses.dataclass(frozen=True)
class Report:
    """What a replica says when it is built and when a generation has ended for it."""

    state: str
    step: int
    evaluated: int
    sha256: str = ""
    leaving: bool = False
    records: tuple[TrainingRecord, ...] = ()
    shares: tuple[ShareWritten, ...] = ()
    error: str = ""
    notices: tuple[Notice, ...] = ()
    diverged: tuple[int, ...] = ()

    @property
    def losses(self) -> list[float]:
        """One a step, in order."""
        return [r.metrics["train/loss"] for r in self.records if "train/loss" in r.metrics]

    @property
    def metrics(self) -> list[tuple[int, dict[str, float]]]:
        """Without what depends on the clock."""
        return [
            (
                r.step,
                {k: v for k, v in r.metrics.items() if not k.startswith(("perf/", "cluster/"))},
            )
            for r in self.records
        ]


class _ReplicaProcess:
    """The replica's end of the pipe: commands on the main thread, training on another."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.lock = threading.Lock()
        self.trainer: Any = None
        self.control: Any = None
        self.leaving = False
        self.worker: Any = None

    def serve(self) -> None:
        signal.signal(signal.SIGTERM, self.leave)
        while True:
            try:
                command, argument = self.pipe.recv()
            except EOFError:
                return
            if command == "build":
                self.build(**argument)
            elif command == "join":
                membership, pausing = argument
                self.control.pause = pausing or self.leaving
                self.control.abort.clear()
                threading.Thread(target=self.run, args=(membership,), daemon=True).start()
            elif command == "abort":
                self.control.abort.set()
            elif command == "work":
                self.work(*argument)

    def leave(self, *_: object) -> None:
        """SIGTERM is a pause and a goodbye."""
        if self.worker is not None:
            self.worker.leave()
        else:
            self.leaving = self.control.pause = True

    def work(self, spec: WorkerSpec, faults: tuple[Fault, ...], tamper: Callable[[Any], None] | None) -> None:
        """Be a worker that a controller leads (see `led`), until it lets go."""
        from tests.distributed.worker_process import TestedWorker, serve, wait_until_built

        self.worker = TestedWorker(spec, faults, tamper)
        wait_until_built(self.worker)
        serve(self.pipe, self.worker)
        self.worker = None

    def build(
        self,
        config: dict[str, Any],
        plan: dict[str, Any],
        run_dir: str,
        faults: tuple[Fault, ...],
        tamper: Callable[[Any], None] | None,
    ) -> None:
        import torch

        from descent.training.trainer import Control, Trainer

        self.control = Control(faults=list(faults))
        device = torch.device("cuda", 0) if plan["device"] == "cuda" else torch.device("cpu")
        self.trainer = Trainer(recompose(config), Plan.from_dict(plan), Path(run_dir), device, self.control)
        if tamper is not None:
            tamper(self.trainer)
        self.report("built")

    def run(self, membership: Membership) -> None:
        from descent.training.checkpointing.restoring import NotRestored
        from descent.training.collectives import PeerLost

        try:
            outcome, error = self.trainer.run(membership), ""
            self.trainer.finish_saving()
        except (PeerLost, NotRestored) as lost:
            outcome, error = "broken", str(lost)
        except BaseException as other:
            outcome, error = "failed", f"{type(other).__name__}: {other}"
        self.report(outcome, error)

    def report(self, outcome: str, error: str = "") -> None:
        state = self.trainer.state
        report = Report(
            outcome,
            state.step,
            state.evaluated,
            self.trainer.sha256(),
            self.leaving,
            tuple(self.control.records),
            tuple(self.control.shares),
            error,
            tuple(self.control.notices),
            self.control.diverged,
        )
        with self.lock:
            self.pipe.send(report)


def _replica(pipe: Connection) -> None:
    # Ctrl-C is for the test; the end of the pipe is for us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)
    _ReplicaProcess(pipe).serve()
    os._exit(0)


class Replica:
    """The test's end of one process."""

    def __init__(self) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_replica, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, command: str, argument: Any = None) -> None:
        self.pipe.send((command, argument))

    def next_report(self) -> Report:
        """The next thing it says. Raises EOFError when it is gone."""
        assert self.pipe.poll(DEADLINE_S), "a replica hangs"
        report: Report = self.pipe.recv()
        return report

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    @property
    def stopped(self) -> bool:
        """Whether it hangs for good; the controller would hear nothing of it for `heartbeat_s`."""
        try:
            return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False

    def show_stacks(self) -> None:
        """Where its threads are, on stderr."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(1)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@dataclasses.dataclass(frozen=True)
class Case:
    """A composed config with what follows from it."""

    config: RunConfig
    plan: Plan
    run_dir: Path

    @classmethod
    def of(cls, overrides: list[str], run_dir: Path, slots: int = 4, device: str = "cpu") -> "Case":
        composed = compose(
            [
                f"workers={slots}",
                f"slots={slots}",
                "resources.cpus=0.25",
                f"device={device}",
                "checkpoint.every=null",
                "diagnostics.every=4",
                *overrides,
            ]
        )
        prepared = prepare(composed.config, cores=1.0, gpus=float(slots if device == "cuda" else 0))
        return cls(composed.config, prepared.plan, run_dir)

    @classmethod
    def as_typed(cls, overrides: list[str], run_dir: Path) -> "Case":
        """What `descent train OVERRIDES` would train, with nothing added."""
        config = compose(overrides).config
        return cls(config, prepare(config, cores=2.0, gpus=0.0).plan, run_dir)


class Crew:
    """A pool of replicas and the store in which their generations meet."""

    def __init__(self, size: int) -> None:
        self.store = Store("127.0.0.1")
        self.generation = 0
        self.idle = [Replica() for _ in range(size)]

    def take(self, count: int) -> list[Replica]:
        """Living replicas; more are started where too few are left."""
        living = [r for r in self.idle if r.alive]
        while len(living) < count:
            living.append(Replica())
        self.idle = living[count:]
        return living[:count]

    def give(self, replicas: list[Replica]) -> None:
        self.idle += [r for r in replicas if r.alive]

    def build(
        self,
        case: Case,
        count: int,
        *,
        faults: Sequence[Injected] = (),
        tamper: dict[int, Callable[[Any], None]] | None = None,
    ) -> list[Replica]:
        """`count` replicas of the case's run at step 0; faults by index.

        tamper: by replica, what is done to its trainer once it is built.
        """
        replicas = self.take(count)
        for index, replica in enumerate(replicas):
            replica.send(
                "build",
                {
                    "config": case.config.to_dict(),
                    "plan": case.plan.to_dict(),
                    "run_dir": str(case.run_dir),
                    "faults": tuple(f.fault for f in faults if f.worker == index),
                    "tamper": (tamper or {}).get(index),
                },
            )
        for replica in replicas:
            assert replica.next_report().state == "built"
        return replicas

    def form(
        self,
        case: Case,
        replicas: list[Replica],
        behind: tuple[int, ...] = (),
        *,
        micro_size: int | None = None,
        pausing: int | None = None,
        save_only: bool = False,
        restore_from: Path | None = None,
    ) -> None:
        """Send the replicas, by rank, into the next generation; rank `pausing` votes for a pause."""
        self.generation += 1
        world = len(replicas)
        for rank, replica in enumerate(replicas):
            membership = Membership(
                self.generation,
                rank,
                world,
                self.store.host,
                self.store.port,
                assign_slots(case.plan.slots, world),
                micro_size or case.plan.micro_size,
                behind,
                save_only=save_only,
                restore_from=str(restore_from) if restore_from else None,
            )
            replica.send("join", (membership, rank == pausing))

    def train(
        self,
        case: Case,
        world: int,
        micro_size: int | None = None,
        tamper: dict[int, Callable[[Any], None]] | None = None,
    ) -> list[Report]:
        """The whole run in one generation of `world` replicas; what each has to say at the end."""
        replicas = self.build(case, world, tamper=tamper)
        self.form(case, replicas, micro_size=micro_size)
        reports = [replica.next_report() for replica in replicas]
        assert [t.state for t in reports] == ["finished"] * world, [t.error for t in reports]
        self.give(replicas)
        return reports

    def until_ended(self, replicas: list[Replica]) -> dict[int, Report]:
        """Index -> how the generation ended, for those who live to tell.

        Like the controller: one that hangs is killed; as soon as one is dead or broken, the
        others are told to leave.
        """
        left = dict(enumerate(replicas))
        reports: dict[int, Report] = {}
        aborted = False
        deadline = time.monotonic() + DEADLINE_S
        while left:
            if time.monotonic() > deadline:
                for replica in left.values():
                    replica.show_stacks()
                raise AssertionError(f"replicas {sorted(left)} hang: stacks on stderr")
            ready = wait([r.pipe for r in left.values()], 0.05)
            lost = False
            for replica in left.values():
                if replica.stopped:
                    replica.process.kill()
            for index, replica in [(i, r) for i, r in left.items() if r.pipe in ready]:
                try:
                    reports[index] = replica.next_report()
                    lost |= reports[index].state in ("broken", "failed")
                except (EOFError, ConnectionResetError):
                    lost = True
                del left[index]
            if lost and not aborted:
                aborted = True
                for replica in left.values():
                    with suppress(BrokenPipeError):  # it may be dying just now
                        replica.send("abort")
        return reports

    def close(self) -> None:
        for replica in self.idle:
            if replica.alive:
                replica.kill()


@contextmanager
def crew(size: int) -> Iterator[Crew]:
    """A pool for a module's tests; no process is left at the end."""
    pool = Crew(size)
    try:
        yield pool
    finally:
        pool.close()
