"""The command line as a user meets it: help, the composed config, and the shell's completion."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from descent.cli.main import app
from descent.config import RunConfig, groups

DESCENT = Path(sys.executable).with_name("descent")
WIDE = {"COLUMNS": "200", "TERM": "dumb"}


@pytest.fixture
def descent(tmp_path, monkeypatch):
    """Call the command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*words: str) -> tuple[int, str, str]:
        result = CliRunner(env=WIDE).invoke(app, list(words))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    return call


def test_config_prints_what_a_run_would_use(descent):
    code, out, err = descent("config", "model=resnet", "optimizer.lr=0.5")
    assert (code, err) == (0, "")
    tree = yaml.safe_load(out)
    assert tree["optimizer"]["lr"] == 0.5 and "resnet" in tree["model"]["_target_"]
    assert set(tree) == set(RunConfig.model_fields) - {"task"}  # a group from which nothing is chosen
    code, out, _ = descent("config", "model=resnet", "optimizer.lr=0.5", "--json")
    assert code == 0 and RunConfig(**json.loads(out)) == RunConfig(**tree)


def test_config_refuses_in_one_line_with_exit_code_2(descent):
    code, out, err = descent("config", "optimzer=sgd")
    assert (code, out) == (2, "")
    assert err == ("error: override 'optimzer=sgd': there is no key or group 'optimzer'; did you mean 'optimizer'?\n")
    code, _, err = descent("config", "--config-dir", "none", "--groups")
    assert code == 2 and err == "error: --config-dir=none: there is no such folder\n"


def test_groups_are_listed_with_a_line_on_each_option(descent, tmp_path):
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/tall.yaml").write_text("# Tall [and] thin\n_target_: torch.nn.Linear\n")
    code, out, _ = descent("config", "--groups", "-c", "mine")
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    for group, options in groups().items():
        assert group in lines
        for option, says in options.items():
            assert [x for x in lines if x.startswith(f"{group}={option} ") and x.endswith(says)]
    assert [x for x in lines if x.startswith("model=tall ") and x.endswith("Tall [and] thin")]
    code, out, _ = descent("config", "--groups", "--json")
    assert code == 0 and json.loads(out) == groups()


def test_versions_are_those_that_are_installed(descent):
    code, out, _ = descent("--version")
    told = dict(line.split() for line in out.splitlines()[1:])
    assert code == 0 and told == {name: version(name) for name in told}
    assert {"descent-service", "torch", "ray", "mlflow"} <= told.keys()


def test_help_teaches(descent):
    code, out, _ = descent("--help")
    assert code == 0
    for verb in ("train", "config", "ui", "submit"):
        assert verb in out
    code, out, _ = descent("train", "--help")
    assert code == 0 and "Exit codes: 0 finished" in out
    # what the help says can be typed
    examples = [x.split("(")[0].split()[2:] for x in out.splitlines() if x.strip(" │").startswith("descent train")]
    assert len(examples) > 3
    for words in examples:
        words = [w for w in words if not w.startswith("resume=")]
        assert descent("config", *words)[0] == 0, words
    for verb in ("config", "ui", "submit"):
        assert descent(verb, "--help")[0] == 0


SHELL = r"""
PATH="$BIN:$PATH"
eval "$(_DESCENT_COMPLETE=source_bash descent)"
ask() {
    COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
    _descent_completion descent
    printf '%s|' "${COMPREPLY[@]}"; printf '\n'
}
ask descent tr
ask descent train model = res
ask descent train model =
ask descent train model=res
ask descent train optimizer = momentum optimizer.mom
ask descent train tracking.uri = http : //h precision = b
ask descent train zzz
ask descent train zzz = 3 --config-dir /none optim
ask descent train resume = my
ask descent checkpoint ls my
"""


def test_bash_completes_groups_keys_and_values(tmp_path):
    """Through the script that `--install-completion` installs; bash cuts words at '=' and ':'."""
    (tmp_path / ".descent/runs/my-run").mkdir(parents=True)
    (tmp_path / ".descent/runs/my-run/run.json").write_text("{}")
    done = subprocess.run(
        ["bash", "--norc", "-c", SHELL],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "BIN": str(DESCENT.parent)},
    )
    assert done.stderr == ""
    lines = [line.rstrip("|").split("|") for line in done.stdout.splitlines()]
    assert lines[0] == ["train"]
    assert lines[1] == ["resnet"]
    assert lines[2] == list(groups()["model"])
    assert lines[3] == ["model=resnet"]
    assert lines[4] == ["optimizer.momentum=", "optimizer.momentum=0.9"]
    assert lines[5] == ["bf16"]
    assert lines[6] == [""] and lines[7] == [""]
    assert lines[8] == ["my-run"] and lines[9] == ["my-run"]


def test_other_shells_complete_too(tmp_path):
    done = subprocess.run(
        [DESCENT],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "_DESCENT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "descent train model=res"},
    )
    assert "model=resnet" in done.stdout and done.stderr == ""


def test_a_setting_with_dashes_is_answered_with_how_it_is_typed(tmp_path):
    for words, typed in ((["--lr", "0.1"], "lr=0.1"), (["--optimizer.lr=0.1"], "optimizer.lr=0.1")):
        done = subprocess.run([DESCENT, "train", *words], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {words[0].partition('=')[0]}: there is no such option")
        assert f" {typed} " in done.stderr and done.stderr.count("\n") == 1


DIES_WHILE_LEAVING = """
import os
from pathlib import Path
from descent.cluster.run import run
from descent.cluster.run.result import RunResult

class Run(run.Run):
    def __init__(self, *_): ...
    def execute(self): return RunResult(state="FINISHED", step=3, run_dir=Path("r"))
    def close(self): os._exit(134)

run.Run = Run
from descent.cli.main import main
main()
"""


def test_a_process_that_dies_while_it_leaves_the_cluster_has_told_its_result(tmp_path):
    """As a native library may do at a process's end; standard output is a pipe, and so has a buffer."""
    command = [sys.executable, "-c", DIES_WHILE_LEAVING, "train", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 134
    summary = json.loads(done.stdout)
    assert (summary["state"], summary["step"]) == ("FINISHED", 3)
