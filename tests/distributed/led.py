"""A run led by the real controller, with the real worker in processes without Ray; and the undisturbed run beside it."""

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

from descent.checkpoint.manifest import read_manifest
from descent.cluster.control.checkpoints import CheckpointCommitter
from descent.cluster.control.controller import Controller
from descent.cluster.control.outcome import Outcome
from descent.cluster.record.run_log import RunLog
from descent.cluster.workers.group import WorkerInfo
from descent.messages import (
    Acknowledged,
    EvaluationRecord,
    Fault,
    Incident,
    Membership,
    ShareWritten,
    TerminalState,
    TrainingRecord,
    WorkerSpec,
    WorkerState,
    WorkerStatus,
)
from descent.training.collectives import Store
from tests.distributed.replicas import DEADLINE_S, Case, Crew, Injected, Replica, Report

RUN = [
    "batch.size=30",
    "model.norm=batch",
    "model.dropout=0.2",
    "evaluate.every=5",
    "ema.decay=0.9",
    "steps=20",
    "epochs=null",
    "reduction=exact",
]
_LONG_S = 1e9


class ProcessGroup:
    """A `WorkerGroup` of the pool's processes. Workers are there when the test starts them; it has no room for more."""

    def __init__(self, pool: Crew, case: Case) -> None:
        self._pool, self._case = pool, case
        self.replicas: dict[str, Replica] = {}
        self._workers: dict[str, WorkerInfo] = {}
        self._polled: set[str] = set()
        self._ready: list[WorkerStatus] = []
        self.memberships: dict[int, dict[str, Membership]] = {}
        """Generation -> worker -> what it was sent."""
        self.pausing: dict[int, int] = {}
        """Generation -> rank of a member that votes for a pause at once."""
        self.before_join: Callable[[], None] = lambda: None
        """What the test does before a generation gets its memberships."""
        self.at_loss: list[Callable[[], None]] = []
        """What the test does when a process has ended, one for each time."""

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        return self._workers

    def add(self, count: int, *faults: Injected) -> None:
        """Build workers, by index with these faults; the next poll reports them as ready."""
        for index, replica in enumerate(self._pool.take(count)):
            worker_id = f"w{len(self._workers)}"
            spec = WorkerSpec(
                worker_id,
                self._case.config.to_dict(),
                self._case.plan.to_dict(),
                str(self._case.run_dir),
                (str(Path.cwd()),),
                self._case.plan.device,
                loopback=True,
            )
            replica.send("work", (spec, tuple(f.fault for f in faults if f.worker == index), None))
            self.replicas[worker_id] = replica
            self._workers[worker_id] = WorkerInfo(worker_id)
        for worker_id, worker in self._workers.items():
            if worker.status is None and not worker.dead:
                replica = self.replicas[worker_id]
                replica.send("poll", (Acknowledged(0, -1), False, 0.0))
                assert replica.pipe.poll(DEADLINE_S), "a replica is not built"
                worker.status = replica.pipe.recv()
                assert worker.status is not None and worker.status.state is WorkerState.READY, worker.status
                self._ready.append(worker.status)

    def start(self, count: int) -> list[str]:  # noqa: ARG002
        return []

    def room(self) -> int:
        return 0

    def capacity(self) -> int:
        return len(self._workers)

    def owns_cluster(self) -> bool:
        return False

    def cluster_failure(self) -> str | None:
        return None

    def restart_cluster(self) -> None:
        raise AssertionError("it isn't lost")

    def kill_process(self, name: str, delay_s: float) -> None:
        raise AssertionError(f"there is no {name} to kill after {delay_s} s")

    def draining_nodes(self) -> set[str]:
        return set()

    def poll(self, *, acknowledged: Acknowledged, reporter: str | None, wait_s: float) -> list[WorkerStatus]:
        statuses, self._ready = self._ready, []
        living = {self.replicas[w].pipe: w for w, worker in self._workers.items() if not worker.dead}
        for pipe, worker_id in living.items():
            if worker_id not in self._polled:
                self._polled.add(worker_id)
                with suppress(BrokenPipeError):  # its end shows below
                    pipe.send(("poll", (acknowledged, worker_id == reporter, wait_s)))
        if not living and not statuses:
            time.sleep(wait_s)
        for pipe in wait(list(living), 0 if statuses else wait_s + 0.2):
            worker_id = living[pipe]  # type: ignore[index]
            try:
                status: WorkerStatus = pipe.recv()  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                self._lose(worker_id, "its process ended")
                if self.at_loss:
                    self.at_loss.pop(0)()
                continue
            self._polled.discard(worker_id)
            self._workers[worker_id].status = status
            statuses.append(status)
        statuses, self._ready = statuses + self._ready, []
        return statuses

    def _lose(self, worker_id: str, cause: str) -> None:
        worker = self._workers[worker_id]
        worker.dead, worker.cause = True, cause
        self.replicas[worker_id].process.join()

    def since_answer_s(self, worker_id: str) -> float:  # noqa: ARG002
        return 0.0

    def unanswered_s(self, worker_id: str) -> float:
        """Long for a process that is stopped, and only for one: a busy machine makes no worker dead."""
        return _LONG_S if self.replicas[worker_id].stopped else 0.0

    def join(self, worker_id: str, membership: Membership) -> None:
        if membership.rank == 0:
            self.before_join()
        self.memberships.setdefault(membership.generation, {})[worker_id] = membership
        self._send(worker_id, "join", membership)
        if self.pausing.get(membership.generation) == membership.rank:
            self._send(worker_id, "request_pause")

    def abort(self, worker_id: str, generation: int) -> None:
        self._send(worker_id, "abort", generation)

    def request_pause(self, worker_id: str) -> None:
        self._send(worker_id, "request_pause")

    def request_checkpoint(self, worker_id: str) -> None:
        self._send(worker_id, "request_checkpoint")

    def inject(self, worker_id: str, fault: Fault) -> None:
        self._send(worker_id, "inject", fault)

    def _send(self, worker_id: str, command: str, *arguments: object) -> None:
        with suppress(BrokenPipeError):
            self.replicas[worker_id].send(command, arguments)

    def kill(self, worker_id: str, cause: str) -> None:
        self.replicas[worker_id].process.kill()
        self._lose(worker_id, cause)

    def release(self, worker_id: str, cause: str) -> None:
        self._workers[worker_id].excused = True
        self.kill(worker_id, cause)

    def release_all(self) -> None:
        """Give the living back to the pool."""
        for worker_id, worker in self._workers.items():
            if not worker.dead:
                worker.dead = True
                replica = self.replicas[worker_id]
                while worker_id in self._polled:  # its answer belongs to nobody else
                    assert replica.pipe.poll(DEADLINE_S)
                    replica.pipe.recv()
                    self._polled.discard(worker_id)
                replica.send("let go")
                self._pool.give([replica])


class _Kept:
    """A listener that keeps everything."""

    def __init__(self) -> None:
        self.records: list[TrainingRecord] = []
        self.incidents: list[Incident] = []
        self.notes: list[str] = []

    def record(self, record: TrainingRecord, world_size: int) -> None:  # noqa: ARG002
        self.records.append(record)

    def incident(self, incident: Incident) -> None:
        self.incidents.append(incident)

    def world(self, generation: int, world_size: int, step: int) -> None: ...

    def note(self, line: str) -> None:
        self.notes.append(line)

    def line(self, line: str) -> None: ...

    def tick(self) -> None: ...


class LedRun:
    """A run from its workers to its outcome, led by the real controller."""

    def __init__(self, pool: Crew, case: Case, most: int | None = None, resumed: Path | None = None) -> None:
        """most: workers that take part at a time; further ones are spares. resumed: the checkpoint to begin with."""
        root = resumed.parent if resumed else case.run_dir / "checkpoints"
        self.case = replace(case, run_dir=root.parent)
        self.group = ProcessGroup(pool, self.case)
        self.kept = _Kept()
        self._most = most
        plan = replace(case.plan, min_workers=1, max_workers=most or case.plan.slots)
        # A long time without progress is no sign here, and a spare is one that the test has built.
        config = case.config.model_copy(update={"spares": 4 if most else 0})
        case.run_dir.mkdir(parents=True, exist_ok=True)
        self.log = RunLog(Path(tempfile.mkdtemp(dir=case.run_dir)))
        self.committer = CheckpointCommitter(root, "r", "0" * 64, config.checkpoint, resumed)
        first_step = read_manifest(resumed).step if resumed else 0
        self.controller = Controller(
            config, plan, self.group, Store("127.0.0.1"), self.log, self.committer, self.kept, first_step=first_step
        )

    def start(self, count: int, *faults: Injected) -> None:
        """Add workers, by index with these faults."""
        self.group.add(count, *faults)

    def until_formed(self, generation: int, pausing: int | None = None) -> dict[str, Membership]:
        """Let the controller go on until it has formed this generation, whose rank `pausing` votes for a pause at once."""
        if pausing is not None:
            self.group.pausing[generation] = pausing
        deadline = time.monotonic() + DEADLINE_S
        while generation not in self.group.memberships:
            assert self.controller.turn() is None and time.monotonic() < deadline, "the run hangs, or has ended"
        return self.group.memberships[generation]

    def finish(self) -> Outcome:
        """Go on until the run is over; it must have reached its last step."""
        deadline = time.monotonic() + DEADLINE_S
        while (decision := self.controller.turn()) is None:
            if time.monotonic() > deadline:
                for worker_id, worker in self.group.workers.items():
                    if not worker.dead:
                        self.group.replicas[worker_id].show_stacks()
                raise AssertionError("the run hangs: stacks on stderr")
        outcome = self.controller._end(decision)
        self.group.release_all()
        self.log.close()
        assert outcome.state is TerminalState.FINISHED, outcome.reason
        assert outcome.state_sha256 is not None, "the replicas differ"
        return outcome

    @property
    def formed(self) -> list[tuple[str, ...]]:
        """The members of each generation, by rank, in order."""
        return [tuple(members) for _, members in sorted(self.group.memberships.items())]

    @property
    def members(self) -> tuple[str, ...]:
        return self.controller._state.generation.members

    @property
    def lost(self) -> int:
        """Workers that crashed or hung."""
        return sum(i.kind == "worker lost" for i in self.kept.incidents)

    @property
    def left(self) -> int:
        """Workers that announced their end."""
        return sum(i.kind == "preempted" for i in self.kept.incidents)

    @property
    def metrics(self) -> dict[tuple[int, bool], dict[str, float]]:
        """By (step, whether it is an evaluation's), without what depends on the clock."""
        return {
            (r.step, isinstance(r, EvaluationRecord)): {
                k: v for k, v in r.metrics.items() if not k.startswith(("perf/", "cluster/"))
            }
            for r in self.kept.records
        }


def assert_survives(pool: Crew, case: Case, undisturbed: Report, world: int, *faults: Injected) -> LedRun:
    """`world` workers go through these faults, and nothing shows afterwards."""
    run = LedRun(pool, case)
    run.start(world, *faults)
    assert_nothing_shows(run, undisturbed)
    return run


def assert_nothing_shows(run: LedRun, undisturbed: Report) -> None:
    outcome = run.finish()
    assert (outcome.step, outcome.state_sha256) == (undisturbed.step, undisturbed.sha256)
    # Every step and every evaluation is there once, with the undisturbed run's figures.
    wanted = {(step, "eval/loss" in m): m for step, m in undisturbed.metrics}
    assert run.metrics == wanted and len(run.kept.records) == len(wanted)
    assert sum(i.steps_lost for i in run.kept.incidents) == 0


def assert_metrics_after(run: LedRun, whole: Report, first: int) -> None:
    """The run's figures are those of the whole run after step `first`."""
    assert run.metrics == {(step, "eval/loss" in m): m for step, m in whole.metrics if step > first}


def shares_of(reports: list[Report], step: int) -> list[ShareWritten]:
    """The shares of one checkpoint, by rank."""
    shares = sorted((p for t in reports for p in t.shares if p.step == step), key=lambda p: p.rank)
    assert [p.rank for p in shares] == list(range(shares[0].world_size))
    return shares
