"""The real controller, led through its states by a worker group that a test speaks for."""

import dataclasses
import hashlib
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import save

from descent.cluster.control import policy
from descent.cluster.control.checkpoints import CheckpointCommitter
from descent.cluster.control.control_file import STATUS_FILE
from descent.cluster.control.controller import Controller
from descent.cluster.control.outcome import Outcome
from descent.cluster.control.run_state import ControllerState
from descent.cluster.record.run_log import RunLog
from descent.errors import ClusterError
from descent.messages import (
    EvaluationRecord,
    FileWritten,
    Incident,
    Membership,
    Notice,
    ShareWritten,
    StepRecord,
    TerminalState,
    TrainingRecord,
    WorkerFailure,
    WorkerState,
    WorkerStatus,
)
from descent.training.collectives import Store
from tests.unit.membership.double import ManualClock, ScriptedGroup
from tests.unit.membership.machine import config_of, plan_of

S, C = WorkerState, ControllerState
STEPS = 10


class Heard:
    """A listener that keeps what it is called with."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.worlds: list[tuple[int, int, int]] = []
        self.incidents: list[Incident] = []

    def record(self, record: TrainingRecord, world_size: int) -> None: ...

    def incident(self, incident: Incident) -> None:
        self.incidents.append(incident)

    def world(self, generation: int, world_size: int, step: int) -> None:
        self.worlds.append((generation, world_size, step))

    def note(self, line: str) -> None:
        self.notes.append(line)

    def line(self, line: str) -> None: ...

    def tick(self) -> None: ...


class Broken:
    """A listener whose terminal is closed."""

    def _fail(self, *_: object) -> None:
        raise BrokenPipeError("the terminal is closed")

    record = incident = world = note = line = tick = _fail


class Play:
    """A run of 10 steps with a controller and workers that do what the test says."""

    def __init__(self, folder: Path, low: int = 1, high: int = 2, *overrides: str, listener: Any = None) -> None:
        self.folder, self.clock = folder, ManualClock()
        self.group = ScriptedGroup(self.clock, high)
        self.listener = listener or Heard()
        self.log = RunLog(folder)
        config = config_of(*overrides)
        root = folder / "checkpoints" if config.checkpoint.dir is None else Path(config.checkpoint.dir)
        self.committer = CheckpointCommitter(
            root, "r", "0" * 64, config.checkpoint, None, folder / "checkpoints", clock=self.clock
        )
        self.controller = Controller(
            config,
            plan_of(low, high, STEPS),
            self.group,
            Store("127.0.0.1"),
            self.log,
            self.committer,
            self.listener,
            clock=self.clock,
        )
        self.ended: policy.End | None = None
        self.seen: list[ControllerState] = []
        self.controller.start()

    @property
    def state(self) -> ControllerState:
        return self.controller._state.state

    def answer(self, worker: str, state: WorkerState, step: int = 0, **more: Any) -> "Play":
        """The worker answers its poll, in the generation whose membership it was sent last."""
        joined = [m.generation for c, w, m in self.group.sent if c == "join" and w == worker]
        given = {"generation": joined[-1] if joined else -1, "evaluated": -1, "phase": "step", "phase_age_s": 0.0}
        status = WorkerStatus(worker, state, step=step, **{**given, **more})  # type: ignore[arg-type]
        self.group.answers.append(status)
        return self

    def all_answer(self, workers: str, state: WorkerState, step: int = 0, **more: Any) -> "Play":
        for worker in workers.split():
            self.answer(worker, state, step, **more)
        return self

    def turn(self, count: int = 1) -> "Play":
        for _ in range(count):
            assert self.ended is None
            self.ended = self.controller.turn()
            if not self.seen or self.seen[-1] != self.state:
                self.seen.append(self.state)
        return self

    def sent(self, command: str) -> list[tuple[str, Any]]:
        """(worker, argument) of all commands of this kind."""
        return [(worker, argument) for c, worker, argument in self.group.sent if c == command]

    def memberships(self, generation: int) -> dict[str, Membership]:
        return {w: m for w, m in self.sent("join") if m.generation == generation}

    def training(self, workers: str = "w0 w1", step: int = 3) -> "Play":
        """The first generation takes steps."""
        self.all_answer(workers, S.READY).turn()
        self.all_answer(workers, S.RUNNING, step).turn()
        assert self.state is C.TRAINING and list(self.memberships(1)) == workers.split()
        return self

    def end(self) -> Outcome:
        assert self.ended is not None
        return self.controller._end(self.ended)


def test_the_first_generation_is_formed_when_all_are_ready(tmp_path: Path) -> None:
    play = Play(tmp_path)
    play.answer("w0", S.READY).turn()
    assert play.state is C.STARTING and not play.sent("join")
    play.answer("w1", S.READY).turn()
    assert play.state is C.TRAINING
    first, second = play.memberships(1).values()
    assert (first.rank, second.rank, first.world_size, first.behind) == (0, 1, 2, (1,))
    assert first.slots == second.slots == ((0, 2), (2, 4))


def test_or_after_a_while_of_those_that_are(tmp_path: Path) -> None:
    play = Play(tmp_path).answer("w0", S.READY).turn()
    play.clock.now += 61.0
    play.turn()
    assert list(play.memberships(1)) == ["w0"]
    assert play.sent("release") == [("w1", "could not be placed within 60 s")]


def test_a_killed_worker_is_done_without(tmp_path: Path) -> None:
    play = Play(tmp_path).training()
    play.group.free = 0
    play.group.die("w1", "killed")
    play.turn()
    assert play.state is C.ABORTING and play.sent("abort") == [("w0", 1)]
    play.answer("w0", S.BROKEN, 4, broken_by="in reduce: connection closed").turn()
    assert play.state is C.TRAINING and list(play.memberships(2)) == ["w0"]
    (lost,) = play.log.incidents
    assert (lost.kind, lost.worker, lost.detail, lost.samples_replayed) == ("worker lost", "w1", "killed", 16)
    assert lost.recovered_in_s is None
    play.clock.now += 1.0
    record = StepRecord(5, {"train/loss": 1.0}, int(play.clock.now * 1000))
    play.answer("w0", S.RUNNING, 5, records=(record,)).turn()
    (lost,) = play.log.incidents
    assert lost.recovered_in_s is not None and 1.0 <= lost.recovered_in_s < 3.0
    assert play.seen == [C.TRAINING, C.ABORTING, C.TRAINING]


def test_a_worker_that_hangs_is_killed_and_its_peers_regroup(tmp_path: Path) -> None:
    play = Play(tmp_path).training()
    play.group.free = 0
    play.group.silent.add("w1")
    play.clock.now += 9.0
    play.answer("w0", S.RUNNING, 3).turn()
    assert not play.sent("kill")
    play.clock.now += 2.0
    play.answer("w0", S.RUNNING, 3).turn()
    assert play.sent("kill") == [("w1", "no answer for 10 s")]
    assert play.state is C.ABORTING and play.sent("abort") == [("w0", 1)]


def test_the_member_that_does_not_follow_an_abort_is_the_one_that_is_stuck(tmp_path: Path) -> None:
    play = Play(tmp_path).training()
    play.group.free = 0
    play.all_answer("w0 w1", S.RUNNING, 3, phase="forward", phase_age_s=301.0).turn()
    assert play.state is C.ABORTING and play.sent("abort") == [("w0", 1), ("w1", 1)]
    play.answer("w0", S.BROKEN, 3).turn()
    play.clock.now += 9.0
    play.turn()
    assert not play.sent("kill")
    play.clock.now += 2.0
    play.turn()
    assert play.sent("kill") == [("w1", "could not be brought to leave its generation, stuck in 'forward'")]
    play.turn()
    assert list(play.memberships(2)) == ["w0"]
    kinds = {i.kind: i.detail for i in play.log.incidents}
    assert kinds.keys() == {"worker lost"} and play.state is C.TRAINING


def test_members_on_a_node_that_drains_hand_over_at_the_end_of_a_step(tmp_path: Path) -> None:
    play = Play(tmp_path).training()
    play.group.free = 0
    play.answer("w1", S.RUNNING, 3, node="spot").turn()
    play.group.draining = {"spot"}
    play.clock.now += 2.0
    play.turn()
    assert play.state is C.PAUSING
    assert play.sent("checkpoint") == [("w1", None)] and play.sent("pause") == [("w0", None), ("w1", None)]
    play.turn(3)
    assert len(play.sent("pause")) == 2  # asked once
    play.all_answer("w0 w1", S.PAUSED, 4).turn()
    assert list(play.memberships(2)) == ["w0"]
    play.answer("w0", S.RUNNING, 5).turn()
    assert play.sent("release") == [("w1", "no longer needed")]
    (goodbye,) = play.log.incidents
    assert (goodbye.kind, goodbye.samples_replayed) == ("preempted", 0)
    assert play.controller._state.failures == 0


def test_an_answer_of_the_last_generation_that_comes_late_moves_nothing(tmp_path: Path) -> None:
    play = Play(tmp_path, 1, 3).training("w0 w1 w2")
    play.group.free = 0
    play.group.die("w2")
    play.turn()
    play.all_answer("w0 w1", S.BROKEN, 3).turn()
    assert list(play.memberships(2)) == ["w0", "w1"]
    # Its poll was answered before the new membership arrived.
    play.answer("w0", S.BROKEN, 3, generation=1, out_of_memory=True, diverged=(0, 1)).turn()
    assert play.state is C.TRAINING and not play.memberships(3)
    assert play.controller._state.micro_size == 8 and play.controller._state.breakage is None
    assert play.controller._state.holds_state("w1")


def test_a_run_grows_at_a_pause_and_newcomers_receive_the_state(tmp_path: Path) -> None:
    play = Play(tmp_path).training()
    play.group.free = 0
    play.group.die("w1")
    play.turn().answer("w0", S.BROKEN, 3).turn().answer("w0", S.RUNNING, 4).turn()
    play.group.free = 1
    play.clock.now += 2.0
    play.turn()
    assert play.sent("start")[-1] == ("w2", None) and play.state is C.TRAINING
    play.answer("w2", S.STARTING).turn()
    assert play.state is C.TRAINING
    play.answer("w2", S.READY).turn()
    assert play.state is C.PAUSING and play.sent("pause") == [("w0", None)]
    play.answer("w0", S.PAUSED, 6).turn()
    assert {w: (m.rank, m.behind) for w, m in play.memberships(3).items()} == {"w0": (0, (1,)), "w2": (1, (1,))}
    # The source dies before the newcomer has the state: nobody holds it any more.
    assert not play.controller._state.holds_state("w2")
    play.group.die("w0")
    play.turn().answer("w2", S.BROKEN, 0).turn()
    assert any("no worker holds the state" in line for line in play.listener.notes)


def test_a_newcomer_that_has_received_the_state_holds_it(tmp_path: Path) -> None:
    play = Play(tmp_path).training()
    play.group.die("w1")
    play.group.free = 1
    play.clock.now += 2.0
    play.turn().answer("w0", S.BROKEN, 3).turn().answer("w0", S.RUNNING, 4).turn()
    play.answer("w2", S.READY).turn().answer("w0", S.PAUSED, 6).turn()
    play.answer("w2", S.RUNNING, 6).turn()
    play.group.free = 0
    play.group.die("w0")
    play.turn().answer("w2", S.BROKEN, 6).turn()
    assert play.state is C.TRAINING and list(play.memberships(4)) == ["w2"]
    assert sum(i.steps_lost for i in play.log.incidents) == 0


def test_workers_that_differ_receive_the_state_anew(tmp_path: Path) -> None:
    play = Play(tmp_path, 1, 3).training("w0 w1 w2")
    play.all_answer("w0 w1 w2", S.PAUSED, 3, diverged=(0,)).turn()
    assert {w: m.rank for w, m in play.memberships(2).items()} == {"w1": 0, "w2": 1, "w0": 2}
    assert play.memberships(2)["w0"].behind == (2,)
    # Its step is right already; only when it has left the phases before the broadcast does it hold the state.
    play.answer("w0", S.RUNNING, 3, phase="receive").turn()
    assert not play.controller._state.holds_state("w0")
    play.answer("w0", S.RUNNING, 3, phase="step").turn()
    assert play.controller._state.holds_state("w0")


def test_a_micro_batch_that_does_not_fit_is_halved_once(tmp_path: Path) -> None:
    play = Play(tmp_path).training()
    play.all_answer("w0 w1", S.BROKEN, 3, out_of_memory=True).turn()
    assert {m.micro_size for m in play.memberships(2).values()} == {4}
    assert len(play.listener.notes) == 1 and "batch.micro_size=4" in play.listener.notes[0]
    assert [i.kind for i in play.log.incidents] == ["out of memory"]


def test_members_that_can_not_connect_again_and_again_are_tried_without_one(tmp_path: Path) -> None:
    play = Play(tmp_path).training(step=0)
    for _ in range(2):
        play.all_answer("w0 w1", S.BROKEN, 0).turn()
    play.turn()
    assert [i.detail for i in play.log.incidents if i.kind == "preempted"] == ["the members could not connect"]
    assert list(play.memberships(3)) == ["w1"]


def bring_to(play: Play, state: ControllerState) -> None:
    if state is C.STARTING:
        play.answer("w0", S.READY).turn()
        return
    play.training()
    play.group.free = 0
    if state is C.PAUSING:
        play.answer("w1", S.RUNNING, 3, leaving=True).turn()
    if state in (C.ABORTING, C.SAVING, C.REGROUPING):
        play.group.die("w1")
        play.turn()
    if state in (C.SAVING, C.REGROUPING):
        play.answer("w0", S.BROKEN, 3).turn()
    if state is C.SAVING:
        play.clock.now += 61.0
        play.turn()
    assert play.state is state


@pytest.mark.parametrize("state", [s for s in C if s not in (C.ENDING, C.ENDED)])
def test_a_stop_ends_the_run_from_every_state(tmp_path: Path, state: ControllerState) -> None:
    low = 2 if state in (C.SAVING, C.REGROUPING) else 1
    play = Play(tmp_path, low)
    bring_to(play, state)
    asked = len(play.sent("pause"))
    play.controller.stop()
    play.turn()
    if state in (C.TRAINING, C.SAVING):
        assert len(play.sent("pause")) > asked
    # What runs comes to its end, and says so.
    for _ in range(3):
        for worker, known in play.group.workers.items():
            generation = play.controller._state.generation
            if not known.dead and worker in generation.members and play.ended is None:
                done = S.BROKEN if state is C.ABORTING and not generation.save_only else S.PAUSED
                play.answer(worker, done, 3)
        if play.ended is None:
            play.turn()
    assert play.ended == policy.End(TerminalState.KILLED, "stopped on request")
    # A fault was under way: the state was written before the end.
    saved = [m for _, m in play.sent("join") if m.save_only]
    assert len(saved) == (1 if state in (C.ABORTING, C.SAVING, C.REGROUPING) else 0)


@pytest.mark.parametrize("person", [False, True])
def test_a_reason_to_end_early_counts_as_the_end_unless_a_person_stops_the_run(tmp_path: Path, person: bool) -> None:
    play = Play(tmp_path).training()
    play.controller.finish_early("observers.x: good enough")
    play.controller.finish_early("observers.y: too late")
    if person:
        play.controller.stop()
        play.controller.finish_early("observers.y: too late")
    play.turn()
    assert len(play.sent("pause")) == 2
    play.all_answer("w0 w1", S.PAUSED, 3).turn()
    early = policy.End(TerminalState.FINISHED, "observers.x: good enough")
    assert play.ended == (policy.End(TerminalState.KILLED, "stopped on request") if person else early)


def test_too_few_workers_write_a_checkpoint_before_the_run_gives_up(tmp_path: Path) -> None:
    play = Play(tmp_path, 2)
    bring_to(play, C.SAVING)
    (membership,) = play.memberships(2).values()
    assert membership.save_only and membership.world_size == 1
    play.answer("w0", S.PAUSED, 3, shares=(written(play, 3, 2),)).turn()
    play.committer.wait(60.0)
    if play.ended is None:
        play.turn()
    assert play.ended is not None and play.ended.state is TerminalState.FAILED
    assert "only 1 of at least 2 workers" in play.ended.reason
    outcome = play.end()
    assert outcome.checkpoint == tmp_path / "checkpoints" / "step-00000003"


def written(play: Play, step: int, generation: int, error: str | None = None) -> ShareWritten:
    """A share that is on disk: rank 0 of 1."""
    folder = Path(str(play.committer.root)) / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    content = save({"model/weight": torch.zeros(3)})
    (folder / "model-00000-of-00001.safetensors").write_bytes(content)
    digests = hashlib.sha256(content).hexdigest(), xxhash.xxh3_128_hexdigest(content)
    file = FileWritten("model-00000-of-00001.safetensors", len(content), *digests)
    return ShareWritten(step, 0, 1, generation, (file,), error=error)


def test_the_last_records_and_the_checkpoint_are_fetched_at_the_end(tmp_path: Path) -> None:
    play = Play(tmp_path, 1, 1).training("w0")
    play.answer("w0", S.FINISHED, STEPS, state_sha256="abc").turn()
    assert play.ended == policy.End(TerminalState.FINISHED)
    records = tuple(StepRecord(step, {"train/loss": 1.0}, 0) for step in range(1, STEPS + 1))
    late = [
        {"records": records[:6]},
        {"records": (*records[6:], EvaluationRecord(STEPS, {"eval/loss": 0.5}, 0)), "shares": (written(play, 10, 1),)},
    ]

    def respond() -> None:
        play.answer("w0", S.FINISHED, STEPS, state_sha256="abc", **(late.pop(0) if late else {}))

    play.group.on_poll = respond
    outcome = play.end()
    assert play.log.acknowledged.step == STEPS and play.log.acknowledged.evaluation == STEPS
    assert (outcome.state, outcome.step, outcome.state_sha256) == (TerminalState.FINISHED, STEPS, "abc")
    assert outcome.checkpoint is not None and outcome.checkpoint.name == "step-00000010"
    assert json.loads((tmp_path / STATUS_FILE).read_text())["controller"] == "ended"


def test_a_state_that_the_checkpoints_place_did_not_take_is_written_into_the_runs_folder(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    play = Play(tmp_path / "run", 1, 1, f"checkpoint.dir={elsewhere}").training("w0")
    failed = written(play, 10, 1, error="no room")
    play.answer("w0", S.FINISHED, STEPS, shares=(failed,)).turn()

    def respond() -> None:
        last = play.sent("join")[-1][1]
        shares = (written(play, 10, last.generation),) if last.save_to else ()
        play.answer("w0", S.PAUSED if last.save_to else S.FINISHED, STEPS, shares=shares)

    play.group.on_poll = respond
    outcome = play.end()
    assert play.sent("join")[-1][1].save_to == str(tmp_path / "run" / "checkpoints")
    assert outcome.checkpoint == tmp_path / "run" / "checkpoints" / "step-00000010"
    assert outcome.unsaved_at == elsewhere


def test_an_exception_that_one_member_raises_once_is_perhaps_its_machines_fault(tmp_path: Path) -> None:
    play = Play(tmp_path, 1, 3).training("w0 w1 w2")
    play.group.free = 0
    failure = WorkerFailure("ValueError", "bad", "traceback", 3)
    play.answer("w1", S.FAILED, 3, failure=failure).turn()
    assert play.state is C.ABORTING
    play.all_answer("w0 w2", S.BROKEN, 3).turn(2)
    assert play.sent("kill") == [("w1", "ValueError: bad")] and list(play.memberships(2)) == ["w0", "w2"]
    play.answer("w0", S.FAILED, 3, failure=failure).turn()
    play.answer("w2", S.BROKEN, 3).turn()
    assert play.ended is not None and play.ended.state is TerminalState.FAILED
    outcome = play.end()
    assert outcome.reason == "ValueError: bad" and outcome.failure == failure


@pytest.mark.parametrize("outlive", [False, True], ids=["workers die with it", "workers outlive it"])
def test_a_lost_cluster_is_started_again_and_the_run_goes_on(tmp_path: Path, outlive: bool) -> None:
    play = Play(tmp_path).training()
    shares = [dataclasses.replace(written(play, 2, 1), rank=rank, world_size=2) for rank in range(2)]
    play.answer("w0", S.RUNNING, 3, shares=(shares[0],)).answer("w1", S.RUNNING, 3, shares=(shares[1],)).turn()
    play.committer.wait(60.0)
    play.group.lost_cluster = "Ray's raylet has ended"
    play.turn()
    # Whoever still trains writes a checkpoint before everything is started anew.
    assert play.sent("checkpoint") == [("w0", None)] and not play.sent("restart")
    step = 2
    if outlive:
        step = 5
        shares = [dataclasses.replace(written(play, 5, 1), rank=rank, world_size=2) for rank in range(2)]
        play.answer("w0", S.RUNNING, 5, shares=(shares[0],)).answer("w1", S.RUNNING, 5, shares=(shares[1],)).turn()
        play.committer.wait(60.0)
    else:
        play.group.die("w0")
        play.group.die("w1")
    play.turn()
    assert len(play.sent("restart")) == 1 and list(play.group.workers) == ["w0", "w1", "w2", "w3"]
    play.turn()
    play.all_answer("w2 w3", S.READY).turn()
    (first, second) = play.sent("join")[-2:]
    assert (first[0], second[0]) == ("w2", "w3")
    assert first[1].restore_from == str(tmp_path / "checkpoints" / f"step-{step:08d}")
    play.all_answer("w2 w3", S.RUNNING, step + 1).turn()
    assert play.state is C.TRAINING
    (incident,) = play.log.incidents
    assert (incident.kind, incident.detail) == ("cluster lost", "Ray's raylet has ended")
    assert play.controller._state.failures == 1


def test_workers_that_outlive_their_cluster_and_write_nothing_are_not_waited_for_long(tmp_path: Path) -> None:
    play = Play(tmp_path).training()
    play.group.lost_cluster = "Ray's gcs_server has ended"
    play.turn()
    play.clock.now += 9.0
    play.all_answer("w0 w1", S.RUNNING, 3).turn()
    assert not play.sent("restart")
    play.clock.now += 2.0
    play.all_answer("w0 w1", S.RUNNING, 3).turn()
    assert len(play.sent("restart")) == 1


def test_a_cluster_that_can_not_be_started_again_ends_the_run_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise ClusterError("a local Ray cluster: can't start")

    play = Play(tmp_path).training()
    monkeypatch.setattr(play.group, "restart_cluster", refuse)
    play.group.lost_cluster = "Ray's raylet has ended"
    play.group.die("w0")
    play.group.die("w1")
    play.turn(2)
    assert play.ended == policy.End(TerminalState.FAILED, "a local Ray cluster: can't start")


def test_anothers_cluster_that_is_gone_for_a_while_disturbs_nobody_who_still_trains(tmp_path: Path) -> None:
    play = Play(tmp_path).training()
    play.group.owned, play.group.lost_cluster = False, "the cluster's head doesn't answer"
    play.turn()
    assert play.sent("checkpoint") == [("w0", None)]
    play.clock.now += 20.0
    play.all_answer("w0 w1", S.RUNNING, 5).turn()
    play.group.lost_cluster = None
    play.clock.now += 20.0
    play.all_answer("w0 w1", S.RUNNING, 7).turn()
    assert play.listener.notes[-1] == "the cluster's head answers again"
    assert play.state is C.TRAINING and not play.sent("restart") and not play.sent("pause")
    assert [i.kind for i in play.log.incidents] == ["cluster lost"]


def test_anothers_cluster_that_stays_away_ends_the_run_with_a_checkpoint_and_the_reason(tmp_path: Path) -> None:
    play = Play(tmp_path).training()
    play.group.owned, play.group.lost_cluster = False, "the cluster's head doesn't answer"
    play.turn()
    play.clock.now += 31.0
    play.all_answer("w0 w1", S.RUNNING, 5).turn()
    assert [worker for worker, _ in play.sent("pause")] == ["w0", "w1"]
    play.all_answer("w0 w1", S.PAUSED, 6).turn()
    assert play.ended is not None and play.ended.state is TerminalState.FAILED
    assert "has not answered for 30 s" in play.ended.reason


def test_workers_that_go_down_with_anothers_cluster_are_counted_and_the_run_ends_with_the_reason(
    tmp_path: Path,
) -> None:
    play = Play(tmp_path).training()
    play.group.owned, play.group.free, play.group.lost_cluster = False, 0, "the cluster's head doesn't answer"
    play.turn()
    play.group.die("w0")
    play.group.die("w1")
    play.turn()
    assert play.ended is None
    play.clock.now += 31.0
    play.turn()
    assert play.ended is not None and play.ended.state is TerminalState.FAILED
    assert "has not answered for 30 s" in play.ended.reason
    assert [i.kind for i in play.log.incidents] == ["cluster lost", "worker lost", "worker lost"]


def test_a_checkpoint_is_never_ahead_of_the_records_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process may be killed at any moment; a resume from the checkpoint must not leave steps out of the log."""
    play = Play(tmp_path, 1, 1).training("w0")
    on_disk = []
    add = play.committer.add_share
    monkeypatch.setattr(
        play.committer,
        "add_share",
        lambda share: (on_disk.append((tmp_path / "metrics.jsonl").read_text()), add(share)),
    )
    records = tuple(StepRecord(step, {"train/loss": 1.0}, 0) for step in (1, 2, 3))
    play.answer("w0", S.RUNNING, 3, records=records, shares=(written(play, 3, 1),)).turn()
    assert [line.split(",")[0] for line in on_disk[0].splitlines()] == ["[1", "[2", "[3"]


def test_a_run_whose_checkpoints_are_all_damaged_ends_with_the_reason(tmp_path: Path) -> None:
    play = Play(tmp_path, 1, 1).training("w0")
    play.answer("w0", S.RUNNING, 3, shares=(written(play, 2, 1),)).turn()
    play.committer.wait(60.0)
    play.turn()
    (tmp_path / "checkpoints" / "step-00000002" / "model-00000-of-00001.safetensors").write_bytes(b"")
    play.group.die("w0")
    play.turn()
    assert play.ended is None
    play.turn()
    assert play.ended is not None and play.ended.state is TerminalState.FAILED
    assert "no complete checkpoint" in play.ended.reason


def test_what_all_ranks_report_is_one_incident(tmp_path: Path) -> None:
    play = Play(tmp_path).training()
    notice = Notice("step repeated", 4, 1, rank=1, detail="rank 1")
    play.all_answer("w0 w1", S.RUNNING, 4, notices=(notice,)).turn()
    play.answer("w0", S.RUNNING, 4, notices=(dataclasses.replace(notice, generation=0),)).turn()
    assert [(i.kind, i.worker) for i in play.log.incidents] == [("step repeated", "w1")]


def test_a_listener_that_raises_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play = Play(tmp_path, listener=Broken()).training()
    play.group.die("w1")
    play.turn().answer("w0", S.BROKEN, 4).turn()
    record = StepRecord(5, {"train/loss": 1.0}, 0)
    play.answer("w0", S.RUNNING, 5, records=(record,)).turn()
    assert play.state is C.TRAINING and play.log.acknowledged.step == 5
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the terminal is closed" in err and "training goes on" in err


def test_a_run_folder_without_room_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play = Play(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        play.training()
        play.group.die("w1")
        play.turn().answer("w0", S.BROKEN, 4).turn()
        records = tuple(StepRecord(step, {"train/loss": 1.0}, 0) for step in range(1, 6))
        play.answer("w0", S.RUNNING, 5, records=records).turn()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert play.state is C.TRAINING
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "can't be written to" in err
    play.turn()
    assert [step for step, _ in play.log.history()["train/loss"]] == [1, 2, 3, 4, 5]


def test_the_status_file_shows_the_controllers_state(tmp_path: Path) -> None:
    play = Play(tmp_path)

    def shown() -> tuple[str, str, int]:
        status = json.loads((tmp_path / STATUS_FILE).read_text())
        return status["state"], status["controller"], status["world_size"]

    play.turn()
    assert shown() == ("RUNNING", "starting", 0)
    play.training()
    assert shown() == ("RUNNING", "training", 2)
    play.group.die("w1")
    play.turn()
    assert shown() == ("RUNNING", "aborting", 1)
