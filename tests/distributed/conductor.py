"""Leads replicas through generations as the controller does, and compares with the undisturbed run."""

from pathlib import Path

from descent.checkpoint.manifest import read_manifest
from descent.checkpoint.reader import newest_checkpoint
from descent.cluster.control import policy
from descent.cluster.control.policy import Form, View, WorkerView
from descent.messages import Notice, ShareWritten, WorkerState
from tests.distributed.replicas import Case, Crew, Injected, Replica, Told

STATES = {
    "built": WorkerState.READY,
    "paused": WorkerState.PAUSED,
    "broken": WorkerState.BROKEN,
    "finished": WorkerState.FINISHED,
    "failed": WorkerState.FAILED,
}
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


class Conductor:
    """Leads a run through its generations as the controller does, with the same policy."""

    def __init__(self, pool: Crew, case: Case, room: int | None = None) -> None:
        """room: how many take part at most; whoever is built beyond that is a spare. None: all."""
        self.pool, self.case, self.room = pool, case, room
        self.replicas: dict[str, Replica] = {}
        self.told: dict[str, Told] = {}
        self.members: tuple[str, ...] = ()
        self.joined: set[str] = set()
        self.formed: list[Form] = []
        self.metrics: dict[tuple[int, bool], dict[str, float]] = {}
        self.lost = self.left = 0
        self.saved: Path | None = None
        """The checkpoint that the run goes on from when nobody holds the state."""
        self.skipped: list[str] = []
        self.notices: tuple[Notice, ...] = ()

    def start(self, count: int, *faults: Injected) -> None:
        for replica in self.pool.build(self.case, count, faults=faults):
            name = f"w{len(self.replicas)}"
            self.replicas[name] = replica
            self.told[name] = Told("built", 0, -1)

    def view(self) -> View:
        workers = {
            name: WorkerView(
                STATES[told.state],
                not self.replicas[name].alive,
                0,
                (told.step, told.evaluated),
                name in self.joined,
            )
            for name, told in self.told.items()
        }
        return View(
            workers,
            self.members,
            self.pool.generation,
            1,
            self.room or max(1, len(workers)),
            saved_step=read_manifest(self.saved).step if self.saved else -1,
        )

    def generation(self, pausing: int | None = None) -> Form:
        """Form the next generation as the policy says, and follow it to its end."""
        decision = policy.decide(self.view())
        if isinstance(decision, policy.Restore):
            self.go_back()
            decision = policy.decide(self.view())
        assert isinstance(decision, Form), decision
        self.formed.append(decision)
        self.members = decision.workers
        chosen = [self.replicas[name] for name in decision.workers]
        source = self.saved if decision.restore else None
        self.pool.form(self.case, chosen, decision.behind, pausing=pausing, restore_from=source)
        if not decision.restore:
            self.joined.update(decision.workers)
        ended = self.pool.until_ended(chosen)
        for index, told in ended.items():
            assert told.state != "failed", told.error
            self.told[decision.workers[index]] = told
            self.notices += told.notices
            if told.step > 0:  # else it has not got the checkpoint's state
                self.joined.add(decision.workers[index])
            self._collect(told)
            if told.leaving:
                chosen[index].kill()
                self.left += 1
        for index in set(range(len(chosen))) - ended.keys():
            self.replicas[decision.workers[index]].process.join()
            self.lost += 1
        return decision

    def go_back(self) -> None:
        """Nobody holds the state: the newest checkpoint that verifies is the next to begin with."""
        assert self.saved is not None
        self.saved, self.skipped = newest_checkpoint(self.saved.parent)
        self.members, self.joined = (), set()

    def _collect(self, told: Told) -> None:
        """What each replica recorded; whoever recorded a step recorded the same."""
        for step, metrics in told.metrics:
            known = self.metrics.setdefault((step, "eval/loss" in metrics), metrics)
            if self.case.config.reduction == "exact":
                assert known == metrics

    def finish(self) -> Told:
        """Go on until the run is over; a member's last word."""
        while not all(self.told[w].state == "finished" for w in self.members) or not self.members:
            self.generation()
        last = [self.told[w] for w in self.members]
        assert len({t.sha256 for t in last}) == 1
        self.pool.give(list(self.replicas.values()))
        return last[0]


def assert_survives(pool: Crew, case: Case, undisturbed: Told, world: int, *faults: Injected) -> Conductor:
    """`world` replicas go through these faults, and nothing tells afterwards."""
    conductor = Conductor(pool, case)
    conductor.start(world, *faults)
    assert_nothing_tells(conductor, undisturbed)
    return conductor


def assert_nothing_tells(conductor: Conductor, undisturbed: Told) -> None:
    last = conductor.finish()
    assert (last.step, last.sha256) == (undisturbed.step, undisturbed.sha256)
    # Every step and every evaluation is there, with the undisturbed run's figures.
    wanted = {(step, "eval/loss" in m): m for step, m in undisturbed.metrics}
    assert conductor.metrics == wanted


def parts_of(told: list[Told], step: int) -> list[ShareWritten]:
    parts = sorted((p for t in told for p in t.parts if p.step == step), key=lambda p: p.rank)
    assert [p.rank for p in parts] == list(range(parts[0].world_size))
    return parts
