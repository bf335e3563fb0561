"""Tracking against a real `mlflow server` that stalls, dies and returns."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from mlflow import MlflowClient

from descent.errors import TrackingError
from descent.tracking import Tracker, replay
from descent.tracking.spool import Spool
from tests.end_to_end.mlflow_server import MlflowServer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("server")).start()
    yield server
    server.kill()


def open_tracker(uri, directory, **options):
    defaults = {"experiment": "tests", "run_name": "test", "system_metrics": False}
    return Tracker.open(uri=uri, spool_dir=directory / "spool", **(defaults | options))


def history(uri, run_id, key):
    """(step, value) of every stored point, in order of the steps."""
    points = MlflowClient(uri).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_stalls_and_dies_loses_and_doubles_nothing(server, tmp_path):
    tracker = open_tracker(server.uri, tmp_path)
    step = 0

    def log(count):
        nonlocal step
        for _ in range(count):
            tracker.log_metrics(step, {"train/loss": 1 / (step + 1), "grad/norm": float(step)})
            step += 1

    log(200)
    wait_until(lambda: tracker.status().delivered > 2)
    log(600)
    # Stopped in the middle of a batch: its reply doesn't come.
    server.signal(signal.SIGSTOP)
    log(400)  # these calls return while nobody answers
    plot = tmp_path / "plot.txt"
    plot.write_text("a plot")
    tracker.log_file(plot, "plots")
    plot.unlink()
    assert tracker.status().pending >= 401
    server.kill()
    log(300)
    wait_until(lambda: tracker.status().last_error is not None)
    server.start()
    log(100)
    assert tracker.finish("FINISHED", deadline_s=60) == 0
    for key, value in (("train/loss", lambda i: 1 / (i + 1)), ("grad/norm", float)):
        assert history(server.uri, tracker.run_id, key) == [(i, value(i)) for i in range(step)]
    client = MlflowClient(server.uri)
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert [f.path for f in client.list_artifacts(tracker.run_id, "plots")] == ["plots/plot.txt"]


WRITER = """
import sys
from pathlib import Path
from descent.tracking import Tracker

tracker = Tracker.open(
    uri=sys.argv[1], experiment="tests", run_name="crash", spool_dir=Path(sys.argv[2]),
    system_metrics=False,
)
print(tracker.run_id, flush=True)
step = 0
while True:
    tracker.log_metrics(step, {"train/loss": float(step)})
    print(step, flush=True)  # only now is it promised
    step += 1
"""


def test_a_writer_that_is_killed_leaves_nothing_undelivered(server, tmp_path):
    spool = tmp_path / "spool"
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), server.uri, str(spool)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run_id = writer.stdout.readline().strip()
    assert run_id, writer.stderr.read()
    promised = [int(writer.stdout.readline()) for _ in range(1000)]
    assert replay(spool, server.uri) == 0  # a living writer's spool is left alone
    writer.send_signal(signal.SIGKILL)
    # what was printed before the kill counts too; its last line may be cut off
    rest = writer.stdout.read().rpartition("\n")[0].split()
    promised += [int(line) for line in rest]
    writer.wait()
    assert replay(spool, server.uri) > 0
    stored = history(server.uri, run_id, "train/loss")
    assert stored == [(i, float(i)) for i in range(len(stored))]
    assert len(stored) >= len(promised)
    assert replay(spool, server.uri) == 0


def test_repeated_delivery_of_the_same_records_changes_nothing(server, tmp_path):
    tracker = open_tracker(server.uri, tmp_path)
    for step in range(50):
        values = {"loss": 0.5, "nan": math.nan, "inf": math.inf, "minus": -math.inf}
        tracker.log_metrics(step, values)
    tracker.log_text("hello", "note.txt")
    assert tracker.finish("KILLED", deadline_s=60) == 0
    (tmp_path / "spool" / "acknowledged").write_text("0")  # as after a crash before the mark
    assert replay(tmp_path / "spool", server.uri) > 50
    for key in ("loss", "nan", "inf", "minus"):
        assert [step for step, _ in history(server.uri, tracker.run_id, key)] == list(range(50))
    assert all(math.isnan(v) for _, v in history(server.uri, tracker.run_id, "nan"))
    assert history(server.uri, tracker.run_id, "inf")[0][1] == sys.float_info.max
    assert MlflowClient(server.uri).get_run(tracker.run_id).info.status == "KILLED"


def test_the_end_of_a_run_is_delivered_later_if_the_server_is_gone(server, tmp_path):
    tracker = open_tracker(server.uri, tmp_path)
    wait_until(lambda: tracker.status().pending == 0)
    server.signal(signal.SIGSTOP)
    try:
        tracker.log_metrics(1, {"train/loss": 0.25})
        assert tracker.finish("FAILED", deadline_s=1) == 2
    finally:
        server.signal(signal.SIGCONT)
    wait_until(lambda: not tracker._courier.is_alive())
    replay(tmp_path / "spool", server.uri)
    assert history(server.uri, tracker.run_id, "train/loss") == [(1, 0.25)]
    assert MlflowClient(server.uri).get_run(tracker.run_id).info.status == "FAILED"


def test_a_resumed_run_goes_on_as_the_same_one(server, tmp_path):
    first = open_tracker(server.uri, tmp_path / "1")
    first.log_params({"steps": 10, "seed": 0})
    first.log_metrics(1, {"train/loss": 1.0})
    assert first.finish("KILLED", deadline_s=60) == 0
    second = open_tracker(server.uri, tmp_path / "2", run_id=first.run_id)
    client = MlflowClient(server.uri)
    assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    second.log_params({"steps": 20, "seed": 0})
    second.log_metrics(2, {"train/loss": 0.5})
    assert second.finish("FINISHED", deadline_s=60) == 0
    run = client.get_run(first.run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"steps": "10", "seed": "0"})
    assert run.data.tags["resumed.steps"] == "20"
    assert history(server.uri, first.run_id, "train/loss") == [(1, 1.0), (2, 0.5)]


def test_an_unknown_run_is_refused(server, tmp_path):
    with pytest.raises(TrackingError, match="check the run's id") as caught:
        open_tracker(server.uri, tmp_path, run_id="0" * 32)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_down_at_the_start_is_one_line(tmp_path):
    with pytest.raises(TrackingError) as caught:
        open_tracker("http://me:hunter2@127.0.0.1:9", tmp_path)
    assert str(caught.value) == (
        "tracking.uri=http://127.0.0.1:9: connection refused; "
        "start the server, or set tracking.uri=null for the embedded store"
    )


def test_the_embedded_store_keeps_everything_without_a_word(tmp_path):
    uri = f"sqlite:///{tmp_path / '.descent' / 'mlflow.db'}"
    code = f"""
        import sys
        from pathlib import Path
        from descent.tracking import Tracker
        assert "mlflow" not in sys.modules
        here = Path({str(tmp_path)!r})
        tracker = Tracker.open(
            uri={uri!r}, experiment="tests", run_name="embedded", spool_dir=here / "spool",
            artifact_root=here / ".descent" / "mlartifacts",
        )
        assert tracker.url is None
        tracker.log_params({{"long": "x" * 9000, "s3.secret_key": "hunter2", "inputs_key": "x"}})
        data = {{"name": "digits", "digest": "abc", "source": "sklearn", "num_samples": 1797}}
        tracker.log_dataset(data, "training")
        tracker.log_metrics(1, {{"train/loss": 1.0, "odd%name//x": 2.0}})
        assert tracker.finish("FINISHED", deadline_s=60) == 0
        import mlflow
        assert mlflow.active_run() is None
        (here / "run_id").write_text(tracker.run_id)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {p.name for p in tmp_path.iterdir()} == {"spool", ".descent", "run_id"}
    client = MlflowClient(uri)
    run = client.get_run((tmp_path / "run_id").read_text())
    assert run.data.params["s3.secret_key"] == "***"
    assert run.data.params["inputs_key"] == "x"
    assert run.data.params["long"].endswith("(cut short: whole in params/long.txt)")
    assert run.data.metrics["odd_name/x"] == 2.0
    assert "system/cpu_utilization_percentage" in run.data.metrics
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.tags[0].value) == ("digits", "training")
    artifacts = tmp_path / ".descent" / "mlartifacts" / run.info.run_id / "artifacts"
    assert (artifacts / "params" / "long.txt").read_text() == "x" * 9000
    assert "torch==" in (artifacts / "environment.txt").read_text()
    assert Spool(tmp_path / "spool").pending() == 0
