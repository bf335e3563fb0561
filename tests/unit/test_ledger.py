"""What faults cost: from their detection to the next committed step, and the time that was useful."""

from pathlib import Path

import pytest

from descent.cluster.record.incidents import IncidentLog
from descent.cluster.record.run_log import RunLog
from descent.messages import Incident, Notice, StepRecord, WorkerState, WorkerStatus


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path)


def committed(step: int, incident: Incident, after_s: float) -> StepRecord:
    return StepRecord(step, {"train/loss": 1.0}, incident.time_ms + int(after_s * 1000))


def test_a_fault_is_over_with_the_first_step_of_the_next_generation(log: RunLog) -> None:
    shown: list[Incident] = []
    incidents = IncidentLog(log, shown.append, batch_size=32)
    incidents.open("worker lost", 7, detected_in_s=0.1, worker="w1")
    (incident,) = shown
    # A record of the old generation that comes late says nothing about the new one.
    assert incidents.committed(committed(8, incident, 0.1)) is None
    incidents.regrouped(8)
    assert incidents.committed(committed(8, incident, 0.2)) is None
    assert incidents.recovering
    assert incidents.committed(committed(9, incident, 0.5)) == 0.5
    assert not incidents.recovering
    kept = log.incidents[0]
    assert (kept.recovered_in_s, kept.detected_in_s) == (0.5, 0.1)
    assert (kept.steps_lost, kept.samples_replayed) == (0, 32)


def test_two_at_once_replay_one_step(log: RunLog) -> None:
    incidents = IncidentLog(log, lambda _: None, batch_size=32)
    incidents.open("worker lost", 7, worker="w1")
    incidents.open("worker lost", 7, worker="w2")
    incidents.regrouped(7)
    incidents.committed(committed(8, log.incidents[0], 1.0))
    assert [i.samples_replayed for i in log.incidents] == [32, 0]
    assert all(i.recovered_in_s is not None for i in log.incidents)


def test_a_goodbye_replays_nothing_and_all_gone_counts_the_lost_steps(log: RunLog) -> None:
    incidents = IncidentLog(log, lambda _: None, batch_size=32)
    incidents.open("preempted", 7, interrupts=False)
    incidents.regrouped(7)
    incidents.committed(committed(8, log.incidents[0], 0.5))
    incidents.open("worker lost", 20)
    incidents.lost(5)
    assert [(i.steps_lost, i.samples_replayed) for i in log.incidents] == [(0, 0), (5, 6 * 32)]


def test_what_all_ranks_report_is_kept_once(log: RunLog) -> None:
    incidents = IncidentLog(log, lambda _: None, batch_size=32)
    notice = Notice("step repeated", 4, 2, rank=1, detail="rank 1")
    for _ in range(3):
        if incidents.is_new(notice):
            incidents.notice(notice, {0: ("w0", "here"), 1: ("w5", "there")})
    (kept,) = log.incidents
    assert (kept.kind, kept.worker, kept.host, kept.samples_replayed) == (
        "step repeated",
        "w5",
        "there",
        32,
    )


def test_useful_time_is_the_reporters(log: RunLog) -> None:
    incidents = IncidentLog(log, lambda _: None, batch_size=32)

    def receive(worker: str, useful_s: float, reporter: bool) -> None:
        incidents.add_useful_time(
            WorkerStatus(worker, WorkerState.RUNNING, 1, 0, -1, "step", 0.0, useful_s=useful_s),
            is_reporter=reporter,
        )

    for useful_s in (1.0, 2.0):
        receive("w0", useful_s, True)
        receive("w1", useful_s, False)
    receive("w1", 3.5, True)  # w0 is gone: from here on the other one's time counts
    assert incidents.useful_s == 3.5
