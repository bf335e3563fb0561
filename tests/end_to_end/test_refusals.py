"""What can't run is refused by the command line: one line on stderr, exit code 2, nothing left behind."""

import json
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from typer.testing import CliRunner

from descent.checkpoint.manifest import checkpoint_root
from descent.cli.main import app
from descent.cluster.record import run_log
from descent.cluster.run.run import config_sha256
from descent.config import compose

DESCENT = Path(sys.executable).with_name("descent")


def only_line(err: str) -> str:
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Call `descent train` in this process, for what is refused before Ray is asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*overrides: str) -> str:
        result = CliRunner().invoke(app, ["train", *overrides])
        assert result.exit_code == 2, (result.output, result.exception)
        assert result.stdout.startswith("starting: ") and result.stdout.count("\n") == 1
        return only_line(result.stderr)

    return call


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in ("/proc/x", "file", "file/inside"):
        line = refused(f"output_dir={folder}")
        assert line.startswith("output_dir=") and "can't write there" in line
    assert refused("checkpoint.dir=file").startswith("checkpoint.dir=")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_tracking_server_that_is_down(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers here
        port = taken.getsockname()[1]
        line = refused(f"tracking.uri=http://127.0.0.1:{port}")
    assert line.startswith("tracking.uri=http://127.0.0.1") and "no answer" in line


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run as it lies on disk, without its training: a run file and a checkpoint's manifest."""
    composed = compose(["epochs=2", "batch.size=32"])
    folder = tmp_path / ".descent/runs/first"
    folder.mkdir(parents=True)
    run_log.write_run_file(
        folder,
        {
            "name": "first",
            "run_id": None,
            "tracking_uri": None,
            "overrides": list(composed.overrides),
            "config_dirs": [],
            "config": composed.config.to_dict(),
            "slots": 2,
            "plan": {},
            "config_sha256": config_sha256(composed.config),
        },
    )
    return folder


def test_a_resume_of_nothing(refused, run_dir):
    for wanted in ("nothing", "/no/such/folder", "frist"):
        assert f"resume={wanted}" in refused(f"resume={wanted}")
    line = refused("resume=first")
    assert "checkpoint" in line and str(checkpoint_root(run_dir, None)) in line


@pytest.mark.usefixtures("run_dir")
def test_a_resume_that_disagrees_names_its_keys(refused):
    line = refused("resume=first", "seed=3", "optimizer=sgd", "batch.size=64")
    for key in ("batch.size=64 (the run has 32)", "optimizer._target_=torch.optim.SGD", "leave these out"):
        assert key in line
    assert "seed=3 (the run has 0)" in refused("resume=first", "seed=3")


@pytest.mark.usefixtures("run_dir")
def test_a_name_that_is_taken(refused):
    assert refused("name=first") == ("name=first: there is such a run already; use resume=first or another name")


def left_behind(mark: str) -> list[str]:
    """Command lines of processes that inherited `mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_a_process_that_stays_would_be_seen():
    mark = f"mark-{uuid.uuid4().hex}"
    with subprocess.Popen(
        ["cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env={**os.environ, "DESCENT_TEST_MARK": mark},
    ) as staying:
        assert staying.stdin is not None and staying.stdout is not None
        # Its answer shows that it runs: for a moment after Popen Linux knows no environment of it.
        staying.stdin.write(b"here\n")
        assert staying.stdout.readline() == b"here\n"
        found = left_behind(mark)
        staying.kill()
    assert found == ["cat "]
    assert left_behind(mark) == []


IN_FULL = {
    "a key": (["optimizer.lrr=0.1"], "did you mean 'optimizer.lr'?"),
    "room": (["workers=40", "slots=40"], "workers=40: the cluster can place"),
    "a file": (
        ["experiment=mine", "--config-dir", "conf"],
        "conf/experiment/mine.yaml: model.widht: MLP has no such argument; did you mean model.width?",
    ),
}


@pytest.mark.parametrize("case", IN_FULL)
def test_in_full_nothing_starts_and_nothing_stays(tmp_path, case):
    words, wanted = IN_FULL[case]
    own = tmp_path / "conf/experiment/mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\n# Mine\nmodel:\n  widht: 3\n")
    mark = f"mark-{uuid.uuid4().hex}"
    done = subprocess.run(
        [DESCENT, "train", "--json", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "DESCENT_TEST_MARK": mark},
        timeout=180,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert wanted in only_line(done.stderr)
    assert left_behind(mark) == []
    runs = tmp_path / ".descent/runs"
    assert not runs.exists() or list(runs.iterdir()) == [], "no trace of a run that never was"


def test_json_of_a_refused_config_is_none(tmp_path):
    done = subprocess.run([DESCENT, "config", "--json", "epochs=abc"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert only_line(done.stderr) == "override 'epochs=abc': must be a number"
    good = subprocess.run([DESCENT, "config", "--json"], capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(good.stdout)["epochs"] == 30.0
