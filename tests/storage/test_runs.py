"""Whole runs whose checkpoints lie on S3: stopped and resumed, and with a store that goes away for a while."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from descent.checkpoint.reader import verify_checkpoint
from descent.cli.main import app
from tests.end_to_end.services import until
from tests.end_to_end.test_stop_and_resume import RUN, SLOW, STEPS, TRUST, Training
from tests.storage.proxy import Proxy, always
from tests.storage.servers import S3Server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "slow.py").write_text(SLOW)
    return tmp_path


@pytest.fixture(params=["moto"])
def server(request: pytest.FixtureRequest, running: dict[str, S3Server], monkeypatch: pytest.MonkeyPatch) -> S3Server:
    found = running[request.param]
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    return found


def at_step(training: Training, name: str, step: int, act: Callable[[], None]) -> None:
    """Do something once a step is logged."""
    metrics = training.folder / ".descent" / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and f"\n[{step}, " in metrics.read_text()):
        assert training.process.poll() is None, training.process.communicate()[1]
        assert time.monotonic() < deadline, f"step {step} not reached"
        time.sleep(0.02)
    act()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "slow.py").write_text(SLOW)
    code, summary, err = Training(folder, [*RUN, "name=whole"]).end()
    assert code == 0, err
    return summary


def test_stopped_and_resumed_from_s3_with_the_same_bits(
    folder: Path, server: S3Server, bucket: str, undisturbed: dict[str, Any]
) -> None:
    there = [f"checkpoint.dir=s3://{bucket}/runs", "checkpoint.every=20", "checkpoint.keep_best=eval/loss"]
    (folder / "LINGER").write_text("65")
    first = Training(folder, [*RUN, "name=cut", *there])
    first.interrupt(signal.SIGINT, "cut", 70)
    code, stopped, _ = first.end()
    assert code == 130 and stopped["checkpoint"].startswith(f"s3://{bucket}/runs/cut/step-")
    (folder / "LINGER").unlink()
    code, resumed, err = Training(folder, ["resume=cut", TRUST, "workers=1", *there]).end()
    assert code == 0, err
    assert resumed["state_sha256"] == undisturbed["state_sha256"]
    assert server.unfinished(bucket) == []
    listed = CliRunner().invoke(app, ["checkpoint", "ls", f"s3://{bucket}/runs/cut", "--json"])
    rows = json.loads(listed.stdout)
    best = min((r for r in rows if "eval/loss" in r), key=lambda r: r["eval/loss"])
    assert rows[0]["step"] == STEPS and 2 <= len(rows) <= 3 and best["step"] in (50, 100, STEPS)


def test_a_store_that_goes_away_costs_checkpoints_and_no_step(
    folder: Path, server: S3Server, proxy: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    (folder / "LINGER").write_text("70")
    training = Training(folder, [*RUN, "name=away", f"checkpoint.dir=s3://{bucket}/runs", "checkpoint.every=10"])
    at_step(training, "away", 25, goes_away(proxy))
    incidents_file = folder / ".descent" / "runs" / "away" / "incidents.jsonl"
    until(lambda: incidents_file.is_file() and "checkpoint failed" in incidents_file.read_text(), "the incident")
    at_step(training, "away", 75, lambda: setattr(proxy, "plan", lambda _: None))
    (folder / "LINGER").unlink()
    code, summary, err = training.end()
    assert code == 0 and summary["step"] == STEPS, err
    incidents = [json.loads(line) for line in incidents_file.read_text().splitlines()]
    failed = [i for i in incidents if i["kind"] == "checkpoint failed"]
    assert failed and all("503 SlowDown" in i["detail"] or "too slow" in i["detail"] for i in failed)
    assert "checkpoint failed" in err and summary["checkpoint"].endswith(f"step-{STEPS:08d}")
    assert server.unfinished(bucket) == []


def goes_away(proxy: Proxy) -> Callable[[], None]:
    return lambda: setattr(proxy, "plan", always("busy"))


def test_a_last_state_that_s3_does_not_take_is_in_the_runs_folder_and_found_there(
    folder: Path, proxy: Proxy, bucket: str, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    there = [f"checkpoint.dir=s3://{bucket}/runs", "checkpoint.every=20"]
    (folder / "LINGER").write_text("65")
    cut = Training(folder, [*RUN, "name=cut", *there])
    at_step(cut, "cut", 50, goes_away(proxy))
    cut.interrupt(signal.SIGINT, "cut", 70)
    code, stopped, err = cut.end()
    own = folder / ".descent" / "runs" / "cut" / "checkpoints"
    assert code == 130 and stopped["checkpoint"].startswith(str(own)), err
    assert verify_checkpoint(Path(stopped["checkpoint"])).step == stopped["step"] > 60

    (folder / "LINGER").unlink()
    proxy.plan = lambda _: None
    code, resumed, err = Training(folder, ["resume=cut", TRUST, "workers=1"]).end()
    assert code == 0 and f"going on from step {stopped['step']}" in err, err
    assert resumed["state_sha256"] == undisturbed["state_sha256"]
    assert resumed["checkpoint"] == f"s3://{bucket}/runs/cut/step-{STEPS:08d}"
    assert resumed["unsaved_at"] is None


@pytest.mark.slow
def test_a_finished_runs_last_state_that_s3_does_not_take_is_in_its_folder(
    folder: Path, proxy: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    there = [f"checkpoint.dir=s3://{bucket}/runs", "checkpoint.every=20"]
    whole = Training(folder, [*RUN, "name=whole", *there])
    at_step(whole, "whole", 50, goes_away(proxy))
    code, ended, err = whole.end()
    assert code == 0 and ended["step"] == STEPS, err
    last = folder / ".descent" / "runs" / "whole" / "checkpoints" / f"step-{STEPS:08d}"
    assert ended["checkpoint"] == str(last) and verify_checkpoint(last).step == STEPS
    assert ended["unsaved_at"] == f"s3://{bucket}/runs/whole"


def test_a_checkpoint_that_is_required_and_fails_ends_the_run(
    folder: Path, proxy: Proxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    (folder / "LINGER").write_text("40")
    training = Training(
        folder,
        [*RUN, "name=strict", f"checkpoint.dir=s3://{bucket}/runs", "checkpoint.every=10", "checkpoint.required=true"],
    )
    at_step(training, "strict", 25, lambda: setattr(proxy, "plan", always("expired")))
    code, summary, _ = training.end()
    assert code == 1 and summary["reason"].startswith("checkpoint.required=true: s3://")
    assert "credentials have expired" in summary["reason"] and summary["step"] < STEPS


def test_what_can_not_work_is_refused_before_it_starts(
    folder: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for override, words in (
        (f"checkpoint.dir=s3://no-{server.port}/x", "no such bucket"),
        ("checkpoint.dir=s3://me:pw@bucket/x", "without credentials"),
        ("init_from=nothing.safetensors", "init_from=nothing.safetensors: no run"),
        (f"init_from=s3://no-{server.port}/w.pt", "no such"),
    ):
        result = CliRunner().invoke(app, ["train", override])
        assert result.exit_code == 2 and words in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1 and "pw@" not in result.stderr
