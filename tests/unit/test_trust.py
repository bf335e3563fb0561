"""A run's folder may come from anybody: it gives nothing the power to run code or to read and send data."""

import json
import shlex
from pathlib import Path

import pytest

from descent.cluster.chaos.comparison import of_run
from descent.cluster.record import run_log
from descent.cluster.run.resume import find_weights
from descent.config import compose, resolve_target
from descent.errors import CheckpointError, ConfigError, DescentError
from tests.unit.test_run_folder import resumed, saved_run

EVIL = ["model=custom", "model._target_=evil.Net"]
TRUST = "trusted_modules=[evil]"
MARK = "raise SystemExit('the code of the run was executed')\n"


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run that somebody sent, with the module that it trusts beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(MARK)
    saved_run(tmp_path, compose([*EVIL, TRUST]), [*EVIL, TRUST], state="FINISHED")
    return tmp_path


def words_to_add(error: DescentError) -> list[str]:
    return shlex.split(str(error).rpartition("add: ")[2])


def test_a_resume_trusts_no_module_that_is_not_typed(foreign: Path) -> None:
    with pytest.raises(ConfigError, match=r"^resume=first: .*must be typed again") as caught:
        resumed(foreign)
    assert words_to_add(caught.value) == [TRUST]
    composed, _ = resumed(foreign, TRUST)
    assert composed.config.trusted_modules == ["evil"]
    # a wider list is typed whole: what the user trusts besides stays in the words to add
    with pytest.raises(ConfigError) as caught:
        resumed(foreign, "trusted_modules=[mine]")
    assert words_to_add(caught.value) == ["trusted_modules=[mine,evil]"]


def test_chaos_trusts_no_module_that_is_not_typed(foreign: Path) -> None:
    with pytest.raises(ConfigError, match=r"^RUN=first: .*must be typed again") as caught:
        of_run("first", ["workers=2"], foreign)
    assert words_to_add(caught.value) == [TRUST]
    _, composed = of_run("first", ["workers=2", TRUST, f"output_dir={foreign}"], foreign)
    assert composed.config.trusted_modules == ["evil"]


def test_a_run_that_was_made_from_a_config_in_python_is_trusted_no_more(tmp_path: Path) -> None:
    saved_run(tmp_path, compose([*EVIL, TRUST]), None)
    with pytest.raises(ConfigError, match=r"add trusted_modules=\[evil\]"):
        resumed(tmp_path)
    composed, _ = resumed(tmp_path, TRUST)
    assert composed.config.trusted_modules == ["evil"]


@pytest.mark.parametrize("hidden", ["+trusted_modules=[evil]", "++trusted_modules=[evil]"])
def test_no_form_of_the_override_is_trusted(tmp_path: Path, hidden: str) -> None:
    """run.json is only text: it may hold what the command line would have refused."""
    run_dir = saved_run(tmp_path, compose([]), [hidden])
    content = json.loads((run_dir / run_log.RUN_FILE).read_text())
    content["config"]["trusted_modules"] = []
    (run_dir / run_log.RUN_FILE).write_text(json.dumps(content))
    composed, _ = resumed(tmp_path)
    assert composed.config.trusted_modules == []
    with pytest.raises(ConfigError, match="not under the trusted modules"):
        resolve_target("evil.Net", composed.config.trusted_modules, "model._target_")


def test_folders_of_config_groups_are_typed_again(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "wide.yaml").write_text("# Wide\n_target_: descent.models.mlp.MLP\nwidth: 9\n")
    composed = compose(["model=wide"], [str(folder)])
    run_dir = saved_run(tmp_path, composed, ["model=wide"])
    content = json.loads((run_dir / run_log.RUN_FILE).read_text())
    (run_dir / run_log.RUN_FILE).write_text(json.dumps({**content, "config_dirs": [str(folder)]}))
    with pytest.raises(ConfigError) as caught:
        resumed(tmp_path)
    assert words_to_add(caught.value) == ["--config-dir", str(folder)]


def test_what_reads_the_environment_is_typed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAIN_WIDTH", "8")
    override = 'model.width="${oc.decode:${oc.env:TRAIN_WIDTH}}"'
    composed = compose([override])
    run_dir = saved_run(tmp_path, composed, [override])
    content = json.loads((run_dir / run_log.RUN_FILE).read_text())
    content["config"] = composed.without_secrets()
    assert content["config"]["model"]["width"] == "${oc.env:TRAIN_WIDTH}"
    (run_dir / run_log.RUN_FILE).write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        resumed(tmp_path)
    assert words_to_add(caught.value) == [override]
    again, _ = resumed(tmp_path, override)
    assert again.config.model["width"] == 8
    monkeypatch.setenv("TRAIN_WIDTH", "9")
    with pytest.raises(CheckpointError, match=r"model.width=.*the run had another value here"):
        resumed(tmp_path, override)


@pytest.mark.parametrize(
    ("override", "variable"),
    [("ray.address=ray://elsewhere:10001", ""), ("tracking.uri=http://elsewhere", "MLFLOW_TRACKING_PASSWORD")],
)
def test_addresses_that_receive_passwords_or_send_code_are_typed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, variable: str
) -> None:
    saved_run(tmp_path, compose([override]), [override])
    if variable:
        resumed(tmp_path)
        monkeypatch.setenv(variable, "hunter2-hunter2")
    with pytest.raises(ConfigError) as caught:
        resumed(tmp_path)
    assert words_to_add(caught.value) == [override]
    key, _, value = override.partition("=")
    composed, _ = resumed(tmp_path, override)
    group, name = key.split(".")
    assert getattr(getattr(composed.config, group), name) == value


def test_a_secret_that_was_typed_is_not_kept_and_is_typed_again(tmp_path: Path) -> None:
    override = "+model.api_key=hunter2-hunter2"
    composed = compose([override])
    run_dir = saved_run(tmp_path, composed, ["+model.api_key=***"])
    content = json.loads((run_dir / run_log.RUN_FILE).read_text())
    content["config"] = composed.without_secrets()
    (run_dir / run_log.RUN_FILE).write_text(json.dumps(content))
    assert "hunter2" not in (run_dir / run_log.RUN_FILE).read_text()
    with pytest.raises(ConfigError) as caught:
        resumed(tmp_path)
    assert words_to_add(caught.value) == ["+model.api_key=…"]
    again, _ = resumed(tmp_path, override)
    assert again.config.model["api_key"] == "hunter2-hunter2"


def test_weights_of_a_foreign_run_need_no_trust(foreign: Path) -> None:
    config = compose([f"output_dir={foreign}", "init_from=first"]).config
    assert str(find_weights(config)).endswith("step-00000040")
