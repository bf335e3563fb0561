"""The run's own files: each step once over resumes, torn lines, incidents that are amended."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from descent.cluster.record.run_log import (
    INCIDENTS_FILE,
    METRICS_FILE,
    RunLog,
    find_run,
    read_run_file,
    write_run_file,
)
from descent.errors import CheckpointError
from descent.messages import EvaluationRecord, Incident, StepRecord


def train(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(step, {"train/loss": loss}, 1000 * step)


def evaluation(step: int) -> EvaluationRecord:
    return EvaluationRecord(step, {"eval/loss": 0.5}, 1000 * step)


def test_after_a_resume_known_steps_are_not_new(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for record in (evaluation(0), train(1), train(2), evaluation(2), train(3)):
        assert log.is_new(record)
        log.append(record)
    log.close()
    again = RunLog(tmp_path)
    assert (again.last_step, again.last_evaluation) == (3, 2)
    assert not again.is_new(train(3)) and again.is_new(train(4))
    assert not again.is_new(evaluation(2)) and again.is_new(evaluation(3))
    again.append(train(4, 0.25))
    assert again.history() == {
        "eval/loss": [(0, 0.5), (2, 0.5)],
        "train/loss": [(1, 1.0), (2, 1.0), (3, 1.0), (4, 0.25)],
    }
    again.close()


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=6), st.data())
def test_a_crash_in_the_middle_of_a_line_costs_that_line_only(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("run")
    log = RunLog(folder)
    for index, loss in enumerate(losses):
        log.append(train(index + 1, loss))
    log.close()
    whole = (folder / METRICS_FILE).read_bytes()
    kept = data.draw(st.integers(0, len(whole)))
    (folder / METRICS_FILE).write_bytes(whole[:kept])
    again = RunLog(folder)
    # A line that lost nothing but its end of line is whole all the same.
    complete = sum(1 for end in _ends(whole) if end - 1 <= kept)
    assert again.last_step == complete
    again.append(train(complete + 1, 0.125))
    assert again.history()["train/loss"] == [
        *((i + 1, loss) for i, loss in enumerate(losses[:complete])),
        (complete + 1, 0.125),
    ]
    again.close()


def _ends(content: bytes) -> list[int]:
    return [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe[1,", b'"text"', b"[1, 2]", b'["1", 2, {}]', b"[3, 4, 5]", b"[]", b"null"]
)
def test_a_damaged_line_is_passed_over(tmp_path: Path, damage: bytes) -> None:
    first = RunLog(tmp_path)
    first.append(train(1))
    first.close()
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(damage + b"\n")
    log = RunLog(tmp_path)
    log.append(train(2))
    assert log.history()["train/loss"] == [(1, 1.0), (2, 1.0)]
    log.close()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A real limit of the kernel's: what would make a file larger is refused, as by a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_one_line_and_nothing_else(tmp_path: Path) -> None:
    shown: list[str] = []
    log = RunLog(tmp_path, shown.append)
    with files_of_at_most(1000):
        for step in range(1, 201):
            log.append(train(step))
            log.incident(Incident("step repeated", step, 1000 * step, detail="x" * 30))
            log.flush()
        log.amend(3, replace(log.incidents[3], recovered_in_s=0.5))
    assert len(shown) == 1 and "can't be written to" in shown[0] and "training goes on" in shown[0]
    log.flush()  # there is room again
    assert log.history()["train/loss"] == [(step, 1.0) for step in range(1, 201)]
    kept = [json.loads(line) for line in (tmp_path / INCIDENTS_FILE).read_text().splitlines()]
    assert [i["step"] for i in kept] == list(range(1, 201)) and kept[3]["recovered_in_s"] == 0.5
    log.close()


def test_an_incident_is_kept_at_once_and_amended_later(tmp_path: Path) -> None:
    first = RunLog(tmp_path)
    first.incident(Incident("worker lost", 3, 1000))
    first.close()
    log = RunLog(tmp_path)
    log.incident(Incident("preempted", 5, 2000))
    log.incident(Incident("worker lost", 7, 3000))
    log.amend(1, replace(log.incidents[1], recovered_in_s=0.25))
    log.close()
    lines = [json.loads(line) for line in (tmp_path / INCIDENTS_FILE).read_text().splitlines()]
    assert [(i["kind"], i["step"], i["recovered_in_s"]) for i in lines] == [
        ("worker lost", 3, None),
        ("preempted", 5, None),
        ("worker lost", 7, 0.25),
    ]


def test_a_run_is_found_by_id_name_and_path(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    write_run_file(folder, {"run_id": "abc123"})
    assert read_run_file(folder) == {"run_id": "abc123"}
    inside = folder / "checkpoints" / "step-00000001"
    for word in ("abc123", "mine", str(folder), str(inside)):
        assert find_run(word, tmp_path) == folder
    with pytest.raises(CheckpointError, match="resume=other: no run of that id, name or path; there are: mine"):
        find_run("other", tmp_path)
    (folder / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        read_run_file(folder)
