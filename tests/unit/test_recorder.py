"""What is recorded of a run, and that nothing that fails in recording reaches the training."""

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from descent.cluster.control.outcome import Outcome
from descent.cluster.record import run_log
from descent.cluster.record.run_log import RunLog
from descent.cluster.run import recorder as recorder_module
from descent.cluster.run.display import Display
from descent.cluster.run.left_over import settle_left_over
from descent.cluster.run.listeners import ListenerGroup
from descent.cluster.run.recorder import RunRecorder
from descent.config import compose
from descent.messages import EvaluationRecord, Incident, StepRecord, TerminalState
from descent.tracking import replay
from descent.tracking.mlflow_sink import RunIdentity
from descent.training.plan import prepare

OVERRIDES = ["steps=4", "epochs=null", "optimizer.lr=0.0123", "workers=1", "tracking.system_metrics=false"]
NOBODY = "http://127.0.0.1:9"


class Recorded:
    """A recorder, and what it has shown to the user."""

    def __init__(self, output_dir: Path, uri: str, name: str = "seen") -> None:
        self.shown = io.StringIO()
        self.run_dir = output_dir / "runs" / name
        self.run_dir.mkdir(parents=True)
        composed = compose([*OVERRIDES, f"output_dir={output_dir}", f"name={name}"])
        display = Display(Console(file=self.shown, width=300), name, 4, 64)
        self.recorder = RunRecorder(
            composed,
            prepare(composed.config, cores=1.0, gpus=0.0),
            output_dir,
            self.run_dir,
            config_sha256="0" * 64,
            uri=uri,
            run_id=None,
            display=display,
            background=ThreadPoolExecutor(1),
        )
        self.recorder.write_run_file()
        self.log = RunLog(self.run_dir)
        self.listeners = ListenerGroup(display, self.recorder.tracker)

    def train(self) -> None:
        """What the controller reports of a short run that lost a worker."""
        self.listeners.world(1, 2, 0)
        for step in range(1, 5):
            metrics = {"train/loss": 1.0 / step, "grad/norm": 1.0, "grad/norm/head": 0.5}
            for record in (
                StepRecord(step, metrics, 1000 * step),
                EvaluationRecord(step, {"eval/loss": 0.5}, 1000 * step),
            ):
                self.log.append(record)
                self.listeners.record(record, 1)
        incident = Incident("worker lost", 3, 3000, worker="w1", host="here", recovered_in_s=0.25, detail="a, b")
        self.log.incident(incident)
        self.listeners.incident(incident)
        self.log.flush()

    def finish(self) -> int:
        outcome = Outcome(TerminalState.KILLED, "stopped", 4, wall_s=9.0, useful_s=6.0, incidents=self.log.incidents)
        return self.recorder.finish(outcome, {"metrics": {"eval/loss": 0.5}, "best": {"eval/loss": 0.5}}, self.log)


def test_a_server_that_goes_away_before_the_first_step_costs_one_line_and_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "_FAILING_S", 0.0)
    monkeypatch.setattr(recorder_module, "_DEADLINE_UNREACHED_S", 0.1)
    run = Recorded(tmp_path, NOBODY)
    run.recorder.check(stepping=False)
    run.train()
    deadline = time.monotonic() + 60
    while "tracking is behind" not in run.shown.getvalue():
        run.recorder.check(stepping=True)
        assert time.monotonic() < deadline, run.shown.getvalue()
        time.sleep(0.01)
    for _ in range(5):
        run.recorder.check(stepping=True)
    (line,) = [line for line in run.shown.getvalue().splitlines() if "tracking is behind" in line]
    assert "connection refused" in line and str(run.run_dir / "spool") in line
    assert run.finish() > 10

    # Later, with a server (here the embedded store) everything arrives, and looks as it should.
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    deadline = time.monotonic() + 60
    while replay(run.run_dir / "spool", uri) == 0:  # the delivery thread may still be in its last call
        assert time.monotonic() < deadline
        time.sleep(0.05)
    identity = RunIdentity.read(run.run_dir / "spool")
    assert identity is not None and identity.run_id is not None
    kept = MlflowClient(uri).get_run(identity.run_id)
    assert (kept.info.status, kept.info.run_name) == ("KILLED", "seen")
    note = kept.data.tags["mlflow.note.content"]
    for part in (
        "**result** stopped at step 4",
        "lr 0.0123",
        "26,122 parameters",
        "| 3 | worker lost | w1 | 0.2 s | 0 |",
    ):
        assert part in note
    assert kept.data.tags["descent.command"].startswith("descent train steps=4 epochs=null optimizer.lr=0.0123")
    params = kept.data.params
    assert {"model", "data", "optimizer", "optimizer.lr", "seed", "steps", "total_steps"} <= params.keys()
    assert len(params) < 40
    # charts of single layers come after the loss; one generation alone is no chart
    assert {"train/layer_gradients/head", "train/loss", "workers/incidents"} <= kept.data.metrics.keys()
    assert "workers/world_size" not in kept.data.metrics
    names = {file.path for file in MlflowClient(uri).list_artifacts(identity.run_id)}
    assert {"config.yaml", "incidents.csv", "incidents.jsonl", "plots"} <= names


def test_the_note_of_a_short_run_ends_with_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first description is still being written when such a run is over."""
    monkeypatch.setattr(recorder_module, "_DEADLINE_UNREACHED_S", 0.0)
    run = Recorded(tmp_path, NOBODY)
    run.train()
    run.recorder.check(stepping=True)
    run.finish()
    lines = (run.run_dir / "spool" / "records.jsonl").read_text().splitlines()
    notes = [json.loads(line).get("tags", {}).get("mlflow.note.content") for line in lines]
    first, last = [note for note in notes if note]
    assert "**result**" not in first and "**result** stopped at step 4" in last


def test_a_run_that_broke_off_before_its_first_step_leaves_nothing_to_deliver(tmp_path: Path) -> None:
    run = Recorded(tmp_path, NOBODY)
    run.listeners.world(1, 1, 0)
    run.recorder.abandon()
    assert not (run.run_dir / "spool").exists()


def test_what_is_wrong_with_one_run_is_named_and_stops_no_other(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for name in ("a-empty", "b-lost", "c-good"):
        folder = tmp_path / "runs" / name
        (folder / "spool").mkdir(parents=True)
        run_log.write_run_file(folder, {"name": name, "tracking_uri": None, "state": "FINISHED"})
        (folder / "spool" / "records.jsonl").write_text('{"op":"batch","step":1,"time":1,"metrics":{"train/loss":1}}\n')
        RunIdentity.new("tests", name, tmp_path / "mlartifacts").write(folder / "spool")
    (tmp_path / "runs" / "a-empty" / "run.json").write_text("")
    (tmp_path / "runs" / "b-lost" / "spool" / "run.json").write_text('{"run_id": "' + "0" * 32 + '"}')
    lines = list(settle_left_over(tmp_path, None, uri))
    assert lines[0].startswith(f"passed over: {tmp_path / 'runs' / 'a-empty'}: not the folder of a run")
    assert lines[1].startswith("b-lost: its records could not be delivered: ")
    assert lines[2] == "delivered 1 records that c-good had left behind"
    assert len(lines) == 3
