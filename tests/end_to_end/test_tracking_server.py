"""Tracking against a real `mlflow server` that stalls, dies and returns."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import mlflow
import pytest
from mlflow import MlflowClient

from descent.errors import TrackingError
from descent.tracking import Tracker, replay
from descent.tracking.check import check_tracking
from descent.tracking.delivery import DeliveryThread
from descent.tracking.mlflow_sink import MlflowSink, RunIdentity
from descent.tracking.spool import Spool
from tests.end_to_end.mlflow_server import MlflowServer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("server")).start()
    yield server
    server.kill()


def open_tracker(uri, directory, **options):
    """A tracker that delivers."""
    defaults = {"experiment": "tests", "run_name": "test"}
    tracker = Tracker.open(uri=uri, spool_dir=directory / "spool", **(defaults | options))
    tracker.start(system_metrics=False)
    return tracker


def connected_tracker(uri, directory, **options):
    tracker = open_tracker(uri, directory, **options)
    assert tracker.wait_until_connected(60), tracker.status()
    return tracker


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
    tracker = connected_tracker(server.uri, tmp_path)
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
)
tracker.start(system_metrics=False)
tracker.wait_until_connected(60)
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
    tracker = connected_tracker(server.uri, tmp_path)
    for step in range(50):
        values = {"loss": 0.5, "nan": math.nan, "inf": math.inf, "minus": -math.inf}
        tracker.log_metrics(step, values)
    tracker.log_text("hello", "note.txt")
    assert tracker.finish("KILLED", deadline_s=60) == 0
    (tmp_path / "spool" / "acknowledged").write_text("0")  # as after a crash before the mark
    assert replay(tmp_path / "spool", server.uri) > 50
    for key in ("loss", "nan"):
        assert [step for step, _ in history(server.uri, tracker.run_id, key)] == list(range(50))
    assert all(math.isnan(v) for _, v in history(server.uri, tracker.run_id, "nan"))
    run = MlflowClient(server.uri).get_run(tracker.run_id)
    assert run.info.status == "KILLED"
    # MLflow would store infinity as another number
    assert not {"inf", "minus"} & run.data.metrics.keys()
    assert run.data.tags["descent.infinite.inf"].startswith("inf at step 0")
    assert run.data.tags["descent.infinite.minus"].startswith("-inf at step 0")


def test_the_end_of_a_run_is_delivered_later_if_the_server_is_gone(server, tmp_path):
    tracker = connected_tracker(server.uri, tmp_path)
    wait_until(lambda: tracker.status().pending == 0)
    server.signal(signal.SIGSTOP)
    try:
        tracker.log_metrics(1, {"train/loss": 0.25})
        assert tracker.finish("FAILED", deadline_s=1) == 2
    finally:
        server.signal(signal.SIGCONT)
    wait_until(lambda: not tracker._delivery.is_alive())
    replay(tmp_path / "spool", server.uri)
    assert history(server.uri, tracker.run_id, "train/loss") == [(1, 0.25)]
    assert MlflowClient(server.uri).get_run(tracker.run_id).info.status == "FAILED"


def test_a_resumed_run_goes_on_as_the_same_one(server, tmp_path):
    first = open_tracker(server.uri, tmp_path / "1")
    first.log_params({"steps": 10, "seed": 0})
    first.log_metrics(1, {"train/loss": 1.0})
    assert first.finish("KILLED", deadline_s=60) == 0
    second = connected_tracker(server.uri, tmp_path / "2", run_id=first.run_id)
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


def test_what_can_be_known_before_the_start_is_refused_in_one_line(server):
    client = MlflowClient(server.uri)
    gone = client.create_experiment("gone")
    run = client.create_run(client.create_experiment("here")).info.run_id
    check_tracking(server.uri, "here", run)
    check_tracking(server.uri, "a new one", None)
    client.delete_experiment(gone)
    client.delete_run(run)
    file = f"sqlite:///{server.directory / 'mlflow.db'}"
    for uri in (server.uri, file):
        for experiment, run_id, message in (
            ("gone", None, f"tracking.experiment=gone: this MLflow experiment was deleted.*--experiment-id {gone}"),
            ("here", run, f"the MLflow run {run} was deleted; bring it back with mlflow runs restore"),
            ("here", "0" * 32, "there is no run 0+ there; check tracking.uri"),
        ):
            with pytest.raises(TrackingError, match=message) as caught:
                check_tracking(uri, experiment, run_id)
            assert "\n" not in str(caught.value)
    with pytest.raises(
        TrackingError, match=r"^tracking.uri=http://127.0.0.1:9: no answer .*refused.*; start the server"
    ):
        check_tracking("http://me:hunter2@127.0.0.1:9", "here", None)


def test_records_of_a_run_whose_server_was_never_reached_arrive_later_once(server, tmp_path):
    tracker = open_tracker("http://127.0.0.1:9", tmp_path)
    for step in range(30):
        tracker.log_metrics(step, {"train/loss": float(step)})
    wait_until(lambda: tracker.status().last_error is not None)
    assert "connection refused" in tracker.status().last_error and tracker.status().failing_s > 0
    assert tracker.run_id is None and tracker.url is None
    assert tracker.finish("FINISHED", deadline_s=1) > 30
    wait_until(lambda: not tracker._delivery.is_alive())

    class LosesTheAnswer(MlflowSink):
        """The server makes the run, and the process dies before it can note which."""

        def _note(self, _identity):
            raise KeyboardInterrupt

    spool = Spool(tmp_path / "spool")
    identity = RunIdentity.read(tmp_path / "spool")
    with pytest.raises(KeyboardInterrupt):
        LosesTheAnswer(server.uri, tmp_path / "spool", identity, running=False).connect()
    spool.close()
    assert replay(tmp_path / "spool", server.uri) > 30
    run_id = RunIdentity.read(tmp_path / "spool").run_id
    assert history(server.uri, run_id, "train/loss") == [(i, float(i)) for i in range(30)]
    run = MlflowClient(server.uri).get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "test")
    same = f"tags.`descent.mark` = '{identity.mark}'"
    assert len(MlflowClient(server.uri).search_runs([run.info.experiment_id], same)) == 1


def test_a_model_has_the_runs_own_metrics_and_the_run_has_them_once(server, tmp_path):
    tracker = connected_tracker(server.uri, tmp_path, run_name="with.model")
    for step in range(3):
        tracker.log_metrics(step, {"eval/loss": 0.5 + step / 7}, 1000 + step)
    model = tmp_path / "model"
    mlflow.pyfunc.save_model(model, loader_module="os", pip_requirements=["numpy"])
    tracker.log_model(model, "with_model", 2, {"eval/loss": (0.5 + 2 / 7, 1002, 2)})
    assert tracker.finish("FINISHED", deadline_s=60) == 0
    assert history(server.uri, tracker.run_id, "eval/loss") == [(step, 0.5 + step / 7) for step in range(3)]
    (found,) = MlflowClient(server.uri).search_logged_models([tracker.experiment_id], "name = 'with_model'")
    assert (found.source_run_id, found.status) == (tracker.run_id, "READY")
    assert [(m.key, m.value, m.step) for m in found.metrics] == [("eval/loss", 0.5 + 2 / 7, 2)]


def test_a_proxys_400_is_tried_again_and_mlflows_own_is_not(tmp_path):
    from mlflow.exceptions import MlflowException, RestException

    sink = MlflowSink("http://127.0.0.1:9", tmp_path, RunIdentity(), running=False)
    # what MLflow's client makes of an answer of 400 without JSON, and with it
    proxy = MlflowException("API request failed with error code 400 != 200. Response body: '<html>'", error_code=1001)
    proxy.error_code = "BAD_REQUEST"
    assert not sink.refuses(proxy)
    assert sink.refuses(RestException({"error_code": "BAD_REQUEST", "message": "no"}))
    assert sink.refuses(RestException({"error_code": "RESOURCE_ALREADY_EXISTS", "message": "no"}))
    assert not sink.refuses(RestException({"error_code": "INTERNAL_ERROR", "message": "no"}))
    assert sink.refuses(RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}))


def spoil(tracker, tmp_path):
    """Records that never arrive: a text whose path the server answers with 400, a file that is lost, no Unicode."""
    tracker.log_text("no", "a%2e%2e/#no?.txt")
    lost = tmp_path / "lost.txt"
    lost.write_text("soon gone")
    tracker.log_file(lost)
    for kept in (tmp_path / "spool" / "files").glob("*/lost.txt"):
        kept.unlink()
    tracker.set_tags({"name": "a\udc80b", "other": "arrives"})


def arrived(server, tracker, tmp_path):
    client = MlflowClient(server.uri)
    run = client.get_run(tracker.run_id)
    assert history(server.uri, tracker.run_id, "loss") == [(step, 0.5) for step in range(6)]
    assert run.data.tags["other"] == "arrives" and "name" not in run.data.tags
    assert "yes.txt" in [f.path for f in client.list_artifacts(tracker.run_id)]
    refused = [json.loads(line) for line in (tmp_path / "spool" / "refused.jsonl").read_text().splitlines()]
    for found, says in zip(refused, ("400", "No such file", "utf-8"), strict=True):
        assert says in found["reason"]
    assert [r["record"]["op"] for r in refused] == ["text", "file", "batch"]
    assert refused[2]["record"]["tags"] == {"name": "a\udc80b"}
    return run.info.status


def test_records_that_always_fail_are_set_aside_and_the_later_ones_arrive(server, tmp_path):
    tracker = connected_tracker(server.uri, tmp_path)
    for step in range(3):
        tracker.log_metrics(step, {"loss": 0.5})
    wait_until(lambda: tracker.status().pending == 0)
    spoil(tracker, tmp_path)
    for step in range(3, 6):
        tracker.log_metrics(step, {"loss": 0.5})
    tracker.log_text("yes", "yes.txt")
    assert tracker.finish("FINISHED", deadline_s=120) == 0
    assert tracker.status().refused == 3
    assert "refused.jsonl" in tracker.status().last_error
    assert arrived(server, tracker, tmp_path) == "FINISHED"


def test_nor_do_they_block_what_a_dead_run_left_behind(server, tmp_path):
    tracker = connected_tracker(server.uri, tmp_path)
    tracker._delivery.finish(60)  # from here on nothing is delivered, as if the process had died
    tracker._spool = Spool(tmp_path / "spool")
    for step in range(3):
        tracker.log_metrics(step, {"loss": 0.5})
    spoil(tracker, tmp_path)
    for step in range(3, 6):
        tracker.log_metrics(step, {"loss": 0.5})
    tracker.log_text("yes", "yes.txt")
    tracker._sampler = None
    tracker._spool.close()
    refused = []
    assert replay(tmp_path / "spool", server.uri, ended=("FAILED", 1), on_refused=refused.append) > 0
    assert refused == [3]
    assert arrived(server, tracker, tmp_path) == "FAILED"


def test_a_proxy_that_answers_everything_with_400_costs_no_record(server, tmp_path):
    """What fails then is the proxy, not the record."""
    from mlflow.exceptions import MlflowException

    class BehindProxy(MlflowSink):
        bad = 30

        def send(self, batch):
            if self.bad:
                self.bad -= 1
                raise MlflowException(
                    "API request to endpoint /x failed with error code 400 != 200. Response body: '<p>'"
                )
            super().send(batch)

    spool = Spool(tmp_path / "spool")
    sink = BehindProxy(server.uri, tmp_path / "spool", RunIdentity(run_name="proxy"), running=True)
    for step in range(6):
        spool.append({"op": "batch", "metrics": {"loss": 0.5}, "step": step, "time": 1})
    delivery = DeliveryThread(spool, sink)
    delivery.start()
    assert delivery.finish(60)
    assert (delivery.refused, sink.bad) == (0, 0)
    assert history(server.uri, sink.identity.run_id, "loss") == [(step, 0.5) for step in range(6)]


def test_a_spool_that_cannot_be_delivered_is_named(server, tmp_path):
    spool = Spool(tmp_path / "spool")
    spool.append({"op": "batch", "metrics": {"a": 1.0}})
    spool.close()
    with pytest.raises(TrackingError, match=r"spool: holds records, but run.json doesn't say of which MLflow run"):
        replay(tmp_path / "spool", server.uri)
    (tmp_path / "spool" / "run.json").write_text('{"run_id": "' + "0" * 32 + '"}')
    with pytest.raises(TrackingError, match="check the run's id"):
        replay(tmp_path / "spool", server.uri)


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
        tracker.start()
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
