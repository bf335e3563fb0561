"""Replicas are killed at any moment; the survivors go on, and nothing tells afterwards."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from service.artifacts import checkpoint
from service.cluster import policy
from service.cluster.policy import Form, View, WorkerView
from service.messages import PartWritten, WorkerState
from tests.distributed.replicas import Case, Crew, Injected, Replica, Told, fail

STATES = {
    "built": WorkerState.READY,
    "paused": WorkerState.PAUSED,
    "broken": WorkerState.BROKEN,
    "finished": WorkerState.FINISHED,
    "failed": WorkerState.FAILED,
}
RUN = ["batch.size=30", "model.norm=batch", "model.dropout=0.2", "evaluate.every=5", "ema.decay=0.9",
       "steps=20", "epochs=null", "reduction=exact"]  # fmt: skip


class Conductor:
    """Leads a run through its generations as the controller does, with the same policy."""

    def __init__(self, pool: Crew, case: Case) -> None:
        self.pool, self.case = pool, case
        self.replicas: dict[str, Replica] = {}
        self.told: dict[str, Told] = {}
        self.members: tuple[str, ...] = ()
        self.joined: set[str] = set()
        self.formed: list[Form] = []
        self.metrics: dict[tuple[int, bool], dict[str, float]] = {}
        self.lost = 0

    def start(self, count: int, *faults: Injected, restore_from: Path | None = None) -> None:
        for replica in self.pool.build(self.case, count, faults=faults, restore_from=restore_from):
            name = f"w{len(self.replicas)}"
            self.replicas[name] = replica
            self.told[name] = Told("built", 0, -1)

    def view(self) -> View:
        workers = {
            name: WorkerView(
                STATES[told.state], not self.replicas[name].alive, 0, (told.step, told.evaluated),
                name in self.joined,
            )
            for name, told in self.told.items()
        }  # fmt: skip
        return View(workers, self.members, self.pool.generation, 1, max(1, len(workers)))

    def generation(self, pausing: int | None = None) -> Form:
        """Form the next generation as the policy says, and follow it to its end."""
        decision = policy.decide(self.view())
        assert isinstance(decision, Form), decision
        self.formed.append(decision)
        self.members = decision.workers
        chosen = [self.replicas[name] for name in decision.workers]
        self.pool.form(self.case, chosen, decision.behind, pausing=pausing)
        self.joined.update(decision.workers)
        ended = self.pool.until_ended(chosen)
        for index, told in ended.items():
            assert told.state != "failed", told.error
            self.told[decision.workers[index]] = told
            self._collect(told)
        for index in set(range(len(chosen))) - ended.keys():
            self.replicas[decision.workers[index]].process.join()
            self.lost += 1
        return decision

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


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of(RUN, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def undisturbed(pool: Crew, case: Case) -> Told:
    return pool.train(case, 1)[0]


def assert_nothing_tells(conductor: Conductor, undisturbed: Told) -> None:
    last = conductor.finish()
    assert (last.step, last.sha256) == (undisturbed.step, undisturbed.sha256)
    # Every step and every evaluation is there, with the undisturbed run's figures.
    wanted = {(step, "eval/loss" in m): m for step, m in undisturbed.metrics}
    assert conductor.metrics == wanted


@pytest.mark.parametrize("seed", range(10))
def test_killed_at_a_random_moment(
    pool: Crew, case: Case, undisturbed: Told, seed: int
) -> None:  # fmt: skip
    rng = random.Random(seed)
    world = rng.choice([2, 3, 4])
    victims = rng.sample(range(world), rng.randrange(1, world))
    faults = [
        fail(v).at(rng.randrange(1, 20), "step", rng.choice([0.0, rng.random() * 0.006]))
        for v in victims
    ]
    conductor = Conductor(pool, case)
    conductor.start(world, *faults)
    assert_nothing_tells(conductor, undisturbed)
    assert conductor.lost == len(victims)


@pytest.mark.parametrize(("phase", "step", "victim"), [
    ("join", 1, 1), ("receive", 1, 0), ("evaluate", 0, 0), ("evaluate", 5, 0), ("evaluate", 10, 2), ("evaluate", 20, 1),
    ("save", 20, 0), ("step", 20, 0), ("forward", 7, 1), ("reduce", 7, 1), ("update", 7, 1),
])  # fmt: skip
def test_killed_in_a_given_phase(
    pool: Crew, case: Case, undisturbed: Told, phase: str, step: int, victim: int
) -> None:
    conductor = Conductor(pool, case)
    conductor.start(3, fail(victim).at(step, phase))
    assert_nothing_tells(conductor, undisturbed)
    assert conductor.lost == 1


def test_a_newcomer_receives_the_state_and_a_whole_new_crew_takes_over(
    pool: Crew, case: Case, undisturbed: Told
) -> None:
    conductor = Conductor(pool, case)
    conductor.start(1)
    conductor.generation(pausing=0)
    assert 0 < conductor.told["w0"].step < undisturbed.step
    # w0 dies as soon as it has handed on its state and taken one more step.
    conductor.start(2)
    grown = conductor.generation(pausing=1)
    assert grown.workers[0] == "w0" and grown.behind == (1, 2)
    conductor.replicas["w0"].kill()
    shrunk = conductor.generation()
    assert shrunk.workers == ("w1", "w2") and shrunk.behind == ()
    assert_nothing_tells(conductor, undisturbed)


@pytest.mark.parametrize(
    "fault",
    [fail(1).at(1), fail(0).at(2), fail(1).at(8, delay_s=0.001), fail(1).at(14, "reduce")],
    ids=str,
)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_with_the_fast_reduction_no_step_is_lost_either(
    pool: Crew, tmp_path: Path, fault: Injected, world: int
) -> None:
    case = Case.of([*RUN, "reduction=fast", "optimizer.lr=1e-3"], tmp_path)
    undisturbed = pool.train(case, world)[0]
    conductor = Conductor(pool, case)
    conductor.start(world, fault)
    assert conductor.finish().step == undisturbed.step
    losses = [
        m["train/loss"] for (_, evaluated), m in sorted(conductor.metrics.items()) if not evaluated
    ]
    assert losses == pytest.approx(undisturbed.losses, rel=1e-4)


def parts_of(told: list[Told], step: int) -> list[PartWritten]:
    parts = sorted((p for t in told for p in t.parts if p.step == step), key=lambda p: p.rank)
    assert [p.rank for p in parts] == list(range(parts[0].world_size))
    return parts


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 1), (1, 4)])
def test_resumed_from_a_checkpoint_by_other_replicas(
    pool: Crew, tmp_path: Path, before: int, after: int, schedule: str
) -> None:
    case = Case.of([*RUN, "checkpoint.every=5", f"schedule={schedule}"], tmp_path)
    whole = pool.train(replace(case, run_dir=tmp_path / "whole"), before)
    root = tmp_path / "whole" / "checkpoints"
    target = checkpoint.commit(root, parts_of(whole, 10), run="r", config_sha256="0" * 64)
    resumed = Conductor(pool, case)
    resumed.start(after, restore_from=target)
    resumed.joined.update(resumed.replicas)
    last = resumed.finish()
    assert last.sha256 == whole[0].sha256
    assert last.metrics == [(step, m) for step, m in whole[0].metrics if step > 10]
