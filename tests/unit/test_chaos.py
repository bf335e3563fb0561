"""What chaos injects, where and when, and how it judges what it saw; the controller is played by hand."""

from pathlib import Path
from typing import Any

import pytest

from descent.cluster.chaos.injector import Chaos, check
from descent.cluster.chaos.verdict import StrikeFile, driver_was_struck
from descent.config import compose
from descent.config.schema import CHAOS_KINDS, CLUSTER_KINDS
from descent.config.schema import Chaos as ChaosConfig
from descent.errors import ConfigError
from descent.messages import Fault, Notice, StepRecord

EVERY = dict.fromkeys(CHAOS_KINDS, 1.0)
MEMBERS = ("w0", "w1", "w2")


def settings(**given: Any) -> ChaosConfig:
    return ChaosConfig(**{"faults": 12, "kinds": EVERY, "every_s": 1.0, **given})


class Killed(Exception):
    """The process of the run is gone."""


class Played:
    """A run of 1,000 steps, one a tenth of a second, that survives whatever comes."""

    def __init__(self, chaos: Chaos) -> None:
        self.chaos = chaos
        self.now, self.step, self.generation = 0.0, 0, 1
        self.members, self.dead = list(MEMBERS), set[str]()
        self.injected: list[tuple[float, str, Fault]] = []

    def turn(self, settled: bool = True) -> list[tuple[str, Fault]]:
        given = self.chaos.due_faults(self.now, self.members, self.dead, self.generation, self.step, settled)
        self.injected += [(self.now, *one) for one in given]
        return given

    def commit(self) -> None:
        self.now, self.step = self.now + 0.1, self.step + 1
        self.chaos.step_committed(StepRecord(self.step, {"train/loss": 1.0}, int(self.now * 1000)))

    def suffer(self, worker: str, fault: Fault) -> None:
        if fault.kind == "driver":
            raise Killed
        if fault.kind in ("raylet", "gcs"):
            assert worker == ""
            self.chaos.cluster_lost()
            self.turn(settled=False)
            self.generation += 2
        elif fault.kind in ("kill", "stop"):
            self.dead.add(worker)
            self.turn(settled=False)
            self.members = [w for w in self.members if w != worker] + [f"n{len(self.dead)}"]
            self.generation += 1
        else:
            self.chaos.struck(Notice("injected", self.step + 1, self.generation, detail=fault.kind), worker)
            self.generation += fault.kind == "partition"
        self.turn(settled=False)

    def play(self, steps: int = 1000) -> "Played":
        while self.step < steps:
            for worker, fault in self.turn():
                assert self.turn() == [], "a second fault before the first is over"
                self.suffer(worker, fault)
            self.commit()
        self.chaos.finished(True)
        return self


def test_all_faults_strike_each_kind_at_least_once_and_are_survived() -> None:
    without_driver = {kind: weight for kind, weight in EVERY.items() if kind != "driver"}
    played = Played(Chaos(settings(kinds=without_driver), 1000, killable=CLUSTER_KINDS)).play()
    verdict = played.chaos.verdict(steps_lost=0).to_dict()
    assert verdict["struck"] == verdict["survived"] == verdict["faults"] == 12
    assert set(verdict["kinds"]) == {*CHAOS_KINDS} - {"driver"}
    assert all(kind["survived"] == kind["struck"] >= 1 for kind in verdict["kinds"].values())
    assert verdict["recovery_worst_s"] == pytest.approx(0.1, abs=0.002)  # the next step
    assert verdict["kinds"]["nan"]["recovery_median_s"] is None


@pytest.mark.parametrize("seed", range(4))
def test_a_run_whose_driver_is_killed_goes_on_with_the_faults_that_are_to_come(tmp_path: Path, seed: int) -> None:
    kinds, step, killed = settings(seed=seed, kinds={**EVERY, "driver": 3.0}, faults=16), 0, 0
    while True:
        file = StrikeFile(tmp_path)
        played = Played(Chaos(kinds, 1000, step, killable=CLUSTER_KINDS, file=file, last_logged=step + 5 * killed))
        played.step = step
        assert driver_was_struck(tmp_path) is (killed > 0)
        try:
            played.play()
            break
        except Killed:
            killed += 1
            step = max(0, played.step - 5)  # the last checkpoint
    verdict = played.chaos.verdict(steps_lost=0).to_dict()
    assert not driver_was_struck(tmp_path)
    assert verdict["struck"] == verdict["survived"] == 16
    assert verdict["kinds"]["driver"]["survived"] == killed >= 1
    assert verdict["kinds"]["driver"]["steps_lost"] >= 5
    assert {kind for kind, found in verdict["kinds"].items() if found["struck"]} == set(CHAOS_KINDS)
    # Faults of other settings are another story.
    assert Chaos(settings(seed=99), 1000, file=StrikeFile(tmp_path)).strikes == []


def test_a_driver_is_not_killed_where_nobody_could_remember_it(tmp_path: Path) -> None:
    only = settings(kinds={"driver": 1.0}, every_s=0.1)
    played = Played(Chaos(only, 100, killable=CLUSTER_KINDS, file=StrikeFile(tmp_path / "run.json" / "no folder")))
    (tmp_path / "run.json").touch()
    played.play(100)
    assert played.chaos.verdict(0).struck == 0


def test_processes_of_anothers_cluster_are_left_alone() -> None:
    chaos = Chaos(settings(kinds={**EVERY, "driver": 0.0}), 1000, killable=("driver",))
    assert {strike.kind for strike in Played(chaos).play().chaos.strikes} == {*CHAOS_KINDS} - {*CLUSTER_KINDS}
    with pytest.raises(ConfigError, match="private cluster only"):
        check(settings(kinds={"raylet": 1.0}), max_workers=2, private=False)
    check(settings(kinds={"raylet": 1.0}), max_workers=1)


def test_the_seed_decides_what_is_injected() -> None:
    def drawn(seed: int) -> list[tuple[float, str, Fault]]:
        return Played(Chaos(settings(seed=seed), 1000)).play().injected

    assert drawn(1) == drawn(1) != drawn(2)


def test_in_a_short_run_the_faults_come_closer_together() -> None:
    played = Played(Chaos(settings(every_s=1000.0), 60)).play(60)
    assert len(played.injected) == 12


class Fast:
    """A run whose steps take a millisecond, on two workers; the controller looks 50 times a second."""

    def __init__(self, chaos: Chaos, steps: int) -> None:
        self.chaos, self.steps = chaos, steps
        self.now, self.step, self.generation, self.started = 0.0, 0, 1, 2
        self.members, self.dead = ["w0", "w1"], set[str]()
        self.sent: list[tuple[str, Fault]] = []

    def play(self) -> "Fast":
        while self.step < self.steps:
            self.sent += self.chaos.due_faults(self.now, self.members, self.dead, self.generation, self.step, True)
            for _ in range(20):
                self.now, self.step = self.now + 0.001, self.step + 1
                for worker, fault in [f for f in self.sent if f[1].step <= self.step]:
                    self.sent.remove((worker, fault))
                    self.strike(worker, fault)
                if self.step == self.steps:
                    break
            self.chaos.step_committed(StepRecord(self.step, {}, int(self.now * 1000)))
        self.chaos.finished(True)
        return self

    def strike(self, worker: str, fault: Fault) -> None:
        if fault.kind in ("kill", "stop"):
            self.dead.add(worker)
            self.members.remove(worker)
            self.generation += 1
            self.chaos.due_faults(self.now, self.members, self.dead, self.generation, self.step - 1, False)
            if self.chaos.needs_peer(self.step - 1):  # nothing is computed until a replacement is there
                self.now += 4.0
                self.members.append(f"w{self.started}")
                self.started += 1
        else:
            self.chaos.struck(Notice("injected", self.step, self.generation, detail=fault.kind), worker)
            self.generation += fault.kind == "partition"
            self.chaos.due_faults(self.now, self.members, self.dead, self.generation, self.step - 1, False)


@pytest.mark.parametrize("steps", [80, 200, 758, 3000])
@pytest.mark.parametrize("seed", range(5))
def test_in_a_run_that_ends_within_a_second_or_two_all_faults_strike(seed: int, steps: int) -> None:
    faults = min(20, steps // 40)  # each needs two of the controller's looks
    chaos = Chaos(settings(faults=faults, seed=seed, every_s=5.0), steps)
    verdict = Fast(chaos, steps).play().chaos.verdict(steps_lost=0)
    assert verdict is not None and (verdict.struck, verdict.survived) == (faults, faults)


def test_a_lone_survivor_of_a_long_run_is_not_held_up() -> None:
    chaos = Chaos(settings(every_s=5.0), 100_000)
    for turn in range(100):
        chaos.due_faults(turn * 0.2, MEMBERS, (), 1, turn * 2, True)
    assert not chaos.needs_peer(200)


def test_nothing_comes_while_the_run_is_unsettled_or_would_be_left_without_a_survivor() -> None:
    deadly = settings(kinds={"kill": 1.0, "partition": 1.0}, every_s=0.1)
    played = Played(Chaos(deadly, 100))
    played.members = ["w0"]
    for _ in range(50):
        assert played.turn() == []
        played.commit()
    played.members = list(MEMBERS)
    assert played.turn(settled=False) == []
    assert len(played.turn()) == 1


def test_a_fault_that_ends_a_run_is_not_survived() -> None:
    played = Played(Chaos(settings(kinds={"kill": 1.0}, faults=3, every_s=0.1), 100))
    while not (given := played.turn()):
        played.commit()
    played.dead.add(given[0][0])
    played.turn(settled=False)
    played.chaos.finished(False)
    verdict = played.chaos.verdict(steps_lost=0)
    assert (verdict.struck, verdict.survived) == (1, 0)


def test_a_growth_in_between_is_not_taken_for_a_recovery() -> None:
    played = Played(Chaos(settings(kinds={"kill_in_save": 1.0}, faults=1, every_s=0.1), 100))
    while not played.turn():
        played.commit()
    played.members.append("w9")
    played.generation += 1
    played.turn(settled=False)
    played.commit()
    assert played.chaos.verdict(0).struck == 0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["chaos.kinds.kil=1"], "did you mean 'chaos.kinds.kill'"),
        (["+chaos.kinds.kil=1"], "kill"),
        (["chaos.faults=3", *(f"chaos.kinds.{kind}=0" for kind in CHAOS_KINDS)], "weight"),
        (["chaos.faults=-1"], "chaos.faults"),
        (["chaos.every_s=0"], "chaos.every_s"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose(overrides)


def test_one_worker_alone_is_refused_unless_no_fault_needs_another() -> None:
    with pytest.raises(ConfigError, match="workers=2"):
        check(settings(), max_workers=1)
    check(settings(kinds={"nan": 1.0, "slow": 1.0}), max_workers=1)
    check(settings(), max_workers=2)
