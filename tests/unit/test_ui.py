"""`descent ui` on a port that is taken: whose it is decides."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from descent.cli.arguments import run_names
from descent.cli.main import app
from descent.cluster.record import run_log
from descent.errors import ConfigError
from descent.tracking.ui import serve

LISTENER = """
import socket, sys
with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    server.listen()
    print(server.getsockname()[1], flush=True)
    sys.stdin.read()
"""


def store(folder: Path) -> Path:
    """A folder with an MLflow store as far as `descent ui` asks it for its newest run."""
    import sqlite3

    folder.mkdir()
    with sqlite3.connect(folder / "mlflow.db") as connection:
        connection.execute("CREATE TABLE runs (run_uuid, experiment_id, start_time)")
        connection.execute("INSERT INTO runs VALUES ('abc', 7, 1)")
    return folder


def test_a_taken_port_is_named_with_its_holder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, others = store(tmp_path / "ours"), store(tmp_path / "others")
    for argument, whose in ((f"sqlite:///{others / 'mlflow.db'}", str(others)), ("-", "process ")):
        listener = subprocess.Popen(
            [sys.executable, "-c", LISTENER, argument], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert listener.stdout is not None
        port = int(listener.stdout.readline())
        try:
            with pytest.raises(ConfigError, match=rf"^--port={port}: .*{whose}.* has this port; use --port 0"):
                serve(ours, "127.0.0.1", port, browser=False)
            if whose == str(others):  # that folder's own UI: it is there already
                assert serve(others, "127.0.0.1", port, browser=False, run_id="abc") == 0
        finally:
            listener.kill()
            listener.communicate()
    page = "#/experiments/7/runs/abc?workflowType=machine_learning"
    assert capsys.readouterr().out.rstrip().endswith(page)


def test_names_of_runs_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("1125-0900-ab12-digits-mlp", "1125-0901-cd34-digits-mlp", "other"):
        (tmp_path / ".descent" / "runs" / name).mkdir(parents=True)
        run_log.write_run_file(tmp_path / ".descent" / "runs" / name, {"name": name})
    (tmp_path / ".descent" / "runs" / "no run").mkdir()

    context = typer.Context(click.Command("ui"))
    assert set(run_names(context, "1125")) == {"1125-0900-ab12-digits-mlp", "1125-0901-cd34-digits-mlp"}
    assert run_names(context, "x") == []


COMMANDS = [
    *([verb] for verb in ("train", "chaos", "config", "ui", "submit", "scale")),
    *(["checkpoint", verb] for verb in ("ls", "verify", "show", "export", "prune")),
    *(["data", verb] for verb in ("tokenize", "index", "inspect", "copy")),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_help_of_every_command_has_an_example(words: list[str]) -> None:
    shown = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [*words, "--help"]).stdout
    after = shown.partition("Example")[2]
    assert f"descent {' '.join(words)}" in after
