"""Wrong overrides and config files are refused in one line: the place, the value, and what would be right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from descent.config import compose, flatten, groups, recompose
from descent.config.completion import complete
from descent.config.secrets import masked
from descent.errors import ConfigError


def refusal(*overrides: str, dirs: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, dirs)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400
    return line


def write(root: Path, name: str, text: str) -> str:
    file = root / "mine" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return str(root / "mine")


NAMES = {
    "model=resnte": "group model has no option 'resnte'; did you mean 'resnet'?",
    "optimzer=sgd": "there is no key or group 'optimzer'; did you mean 'optimizer'?",
    "optimizer.lrr=0.1": "there is no key 'optimizer.lrr'; did you mean 'optimizer.lr'? (a new argument: +optimizer.lrr=0.1)",
    "modle.width=3": "there is no key 'modle'; did you mean 'model.width'?",
    "epochss=3": "there is no key or group 'epochss'; did you mean 'epochs'?",
    "checkpoint.evry=5": "there is no key 'checkpoint.evry'; did you mean 'checkpoint.every'?",
    "epochs.x=3": "there is no key 'epochs.x'; epochs is a single value",
    "+ema.decey=2": "there is no such key; did you mean 'ema.decay'?",
    "~modle": "there is no key or group 'modle'; did you mean 'model'?",
    "~epochs": "epochs is needed",
    "+epochs=3": "epochs is there already; leave the + out to change it",
    "batch=5": "group batch has no option '5'; there are: full, mini, stochastic",
    "model=null": "group model has no option 'null'; there are: custom, gpt",
    "optimizer/lr=3": "there is no group 'optimizer/lr'; did you mean 'optimizer.lr'?",
    "+data.hold_out=0.2": "nothing refers to this key; did you mean 'data.holdout'?",
    "workers={min:3,mx:4}": "workers.mx=4: there is no such key; did you mean 'workers.max'?",
}
VALUES = {
    "epochs=abc": "must be a number",
    "epochs=-1": "must be larger than 0",
    "epochs=nan": "must be a finite number",
    "batch.size=1.5": "must be full or a whole number",
    "batch.size=0": "must be full or larger than 0",
    "workers=two": "must be auto or a whole number or {min, max}",
    "workers={min:3,max:1}": "min=3 is larger than max=1",
    "workers={}": "workers.max is needed",
    "clip.norm=0": "must be larger than 0",
    "clip=null": "must be {norm, value}",
    "data.holdout=2": "must be smaller than 1",
    "seed=1.0": "must be a whole number",
    "seed=9223372036854775808": "must be smaller than 9223372036854775808",
    "compile=yes": "must be true or false",
    "precision=fp8": "must be fp32, bf16 or fp16",
    "name=a/b": "is used as a folder: letters, digits, '.', '_' and '-' only",
    "trusted_modules=mine": "must be a list such as [a, b]",
    "trusted_modules=[my-module]": "'my-module' is not the dotted name of a module",
    "model._target_=5": "needs a `_target_`, the dotted path of a class",
    "checkpoint.every=5x": "is a number of steps, 'epoch', a duration such as 30s, 5m, 1h, auto, or null",
    "seed=${seed}": "Recursive interpolation detected",
    "model.width=${modle.depth}": "Interpolation key 'modle.depth' not found",
}
GRAMMAR = {
    "epochs": "needs the form key=value",
    "=3": "needs the form key=value",
    "": "needs the form key=value",
    "--epochs": "needs the form key=value; settings have no dashes: epochs=…",
    "--lr=0.1": "needs the form key=value; settings have no dashes: optimizer.lr=0.1",
    "--batch-size=3": "settings have no dashes: ",
    "lr=0.1": "there is no key or group 'lr'; did you mean 'optimizer.lr'?",
    "a=[": "can't be read; brackets and quotes must close",
    "'epochs=3'": "can't be read",
    "model.width=1,2": "gives several values, and a run has one",
    "model=mlp,resnet": "gives several values, and a run has one",
    "model=[mlp,resnet]": "group model takes one option",
    "model@other=mlp": "a group has its place; write model=OPTION",
    "hydra.run.dir=/tmp": "Hydra's own settings have no effect here",
}


@pytest.mark.parametrize("override", [*NAMES, *VALUES, *GRAMMAR])
def test_an_override_that_cannot_be_is_named_with_what_would_be_right(override):
    line = refusal(override)
    assert line.startswith(f"override {override!r}: ")
    assert {**NAMES, **VALUES, **GRAMMAR}[override] in line


SLIPS = {
    ("--lr", "0.1"): "override '--lr': needs the form key=value; settings have no dashes: optimizer.lr=0.1",
    ("lr", "=", "0.1"): "override 'lr': needs the form key=value; without spaces around '=': optimizer.lr=0.1",
    ("epochs", "=3"): "override 'epochs': needs the form key=value; without spaces around '=': epochs=3",
    ("seed=", "3"): "override 'seed=': needs the form key=value; without spaces around '=': seed=3",
    ("workers=min:1", "workers=max:2"): "override 'workers=min:1': the shell has taken the braces apart; "
    "put quotes around it: 'workers={min:1,max:2}'",
}


@pytest.mark.parametrize("words", SLIPS)
def test_habits_of_other_programs_and_the_shell_get_the_right_words(words):
    assert refusal(*words) == SLIPS[words]


def test_a_run_has_one_length():
    assert refusal("steps=10") == (
        "steps=10 and epochs=30.0 (in configs/config.yaml): a run has one length; add epochs=null"
    )
    assert refusal("experiment=stdlib_gpt", "epochs=2").startswith(
        "steps=400 (in configs/experiment/stdlib_gpt.yaml) and epochs=2: a run has one length; add steps=null"
    )
    assert "a run needs a length" in refusal("epochs=null")
    assert compose(["steps=10", "epochs=null"]).config.steps == 10


FILES = {
    "experiment/a.yaml": (
        "# @package _global_\n# A\nepochss: 3\n",
        "experiment=a",
        "epochss=3: there is no such key; did you mean 'epochs'?",
    ),
    "experiment/b.yaml": (
        "# @package _global_\n# B\ncheckpoint:\n  evry: 3\n",
        "experiment=b",
        "checkpoint.evry=3: there is no such key; did you mean 'checkpoint.every'?",
    ),
    "experiment/c.yaml": (
        "# @package _global_\n# C\nbatch:\n  size: 1.5\n",
        "experiment=c",
        "batch.size=1.5: must be full or a whole number",
    ),
    "experiment/d.yaml": (
        "# @package _global_\n# D\ndefaults:\n  - override /model: resnte\n",
        "experiment=d",
        "defaults: group model has no option 'resnte'; did you mean 'resnet'?",
    ),
    "experiment/e.yaml": (
        "# @package _global_\n# E\ntrusted_modules: [os]\n",
        "experiment=e",
        "trusted_modules=[os]: a file can't vouch for itself",
    ),
    "experiment/f.yaml": (
        "# F\nseed: 3\n",
        "experiment=f",
        "an experiment needs '# @package _global_' as its first line",
    ),
    "experiment/g.yaml": (
        "# @package _global_\n# G\nseed: 1\nseed: 2\n",
        "experiment=g",
        "line 4: is not valid YAML: found duplicate key seed",
    ),
    "batch/mine.yaml": (
        "# Mine\nsize: 8\nmicro_sise: 4\n",
        "batch=mine",
        "batch.micro_sise=4: there is no such key; did you mean 'batch.micro_size'?",
    ),
    "data/mine.yaml": (
        "# Mine\nname: x\nhold_out: 0.2\ntrain:\n  _target_: descent.data.digits.Digits\n",
        "data=mine",
        "data.hold_out=0.2: nothing refers to this key; did you mean 'data.holdout'?",
    ),
    "model/broken.yaml": ("# Broken\na: [1\nb: c\n", "model=broken", "is not valid YAML"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_key_in_a_users_file_is_reported_with_the_name_of_the_file(tmp_path, monkeypatch, name):
    text, override, wanted = FILES[name]
    folder = write(tmp_path, name, text)
    monkeypatch.chdir(tmp_path)
    line = refusal(override, dirs=(folder,))
    assert line.startswith(f"mine/{name}") and wanted in line


def test_the_file_of_an_argument_is_named_when_its_class_refuses_it(tmp_path, monkeypatch):
    folder = write(tmp_path, "model/wide.yaml", "# Wide\n_target_: descent.models.mlp.MLP\nwidht: 9\n")
    monkeypatch.chdir(tmp_path)
    composed = compose(["model=wide"], [folder])
    located = composed.located(ConfigError("model.widht: MLP has no such argument"))
    assert str(located) == "mine/model/wide.yaml: model.widht: MLP has no such argument"
    # no file is named for a key that the user typed, and none for a default
    for overrides in (["model.width=0"], []):
        error = ConfigError("model.width=0: must be 1 or more")
        assert str(compose(overrides).located(error)) == str(error)
    located = compose(["experiment=gpt_124m"]).located(ConfigError("device=cuda: no GPU"))
    assert str(located) == "configs/experiment/gpt_124m.yaml: device=cuda: no GPU"


def test_a_users_file_that_hydra_would_not_read_is_refused(tmp_path):
    assert "there is no such folder" in refusal(dirs=(str(tmp_path / "none"),))
    folder = write(tmp_path, "model/mlp.yaml", "# Mine\n_target_: x.Y\n")
    assert "configs/model has model=mlp already; give yours another name" in refusal(dirs=(folder,))
    (tmp_path / "mine/model/mlp.yaml").unlink()
    write(tmp_path, "config.yaml", "seed: 3\n")
    assert "mine/config.yaml: would not be read" in refusal(dirs=(folder,))


def test_a_file_that_is_not_text(tmp_path):
    folder = write(tmp_path, "model/odd.yaml", "")
    (tmp_path / "mine/model/odd.yaml").write_bytes(b"\xff\xfe\x00")
    assert "model/odd.yaml: can't be read as UTF-8 text" in refusal(dirs=(folder,))


def test_a_users_own_options_are_listed_and_chosen(tmp_path):
    folder = write(tmp_path, "model/vision/tall.yaml", "# Tall and thin\n_target_: torch.nn.Linear\n")
    assert groups([folder])["model"]["vision/tall"] == "Tall and thin"
    composed = compose(["model=vision/tall"], [folder])
    assert composed.config.model["_target_"] == "torch.nn.Linear"
    assert composed.config_dirs == (str(Path(folder).resolve()),)


@pytest.mark.parametrize("group", ["model", "data", "optimizer"])
def test_custom_names_the_keys_that_it_needs(group):
    key = "data.train._target_" if group == "data" else f"{group}._target_"
    assert refusal(f"{group}=custom") == (
        f"{group}=custom needs {key}, which is not set: add {key}=my_module.MyClass trusted_modules=[my_module]"
    )


def test_secrets_stay_out_of_errors_and_printouts(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("TRAIN_HOST", "example.org")
    for overrides in (
        ["tracking.uri=ftp://me:hunter2@host"],
        ["tracking.uri=http://me:hunter2@host"],
        ["+tracking.password=hunter2"],
        ["+api_token=hunter2"],
        ["tracking.experiment=${oc.env:AWS_SECRET_ACCESS_KEY}"],
        ["tracking.experiment=${oc.env:${name}}", "name=AWS_SECRET_ACCESS_KEY"],
        ["name=${oc.decode:${oc.env:AWS_SECRET_ACCESS_KEY}}"],
        ["+model.token=hunter2", "optimzer=sgd"],
        ["+model.api_key=hunter2,3"],
    ):
        assert "hunter2" not in refusal(*overrides)
    assert "MLFLOW_TRACKING_PASSWORD" in refusal("tracking.uri=http://me:hunter2@host")
    assert "hunter2" not in compose(["+model.api_key=hunter2"]).yaml
    assert masked({"a": [{"password": "x"}], "b": 1}) == {"a": [{"password": "***"}], "b": 1}
    read = compose(["tracking.experiment=${oc.env:TRAIN_HOST}"]).config.tracking.experiment
    assert read == "example.org"
    assert "is not set" in refusal("tracking.experiment=${oc.env:NO_SUCH_VARIABLE}")


def test_a_config_survives_its_own_saving():
    config = compose(["workers={min:1,max:2}", "checkpoint.every=5m", "model=resnet"]).config
    assert recompose(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"saved config: .*epochs=abc: must be a number"):
        recompose({**config.to_dict(), "epochs": "abc"})
    assert flatten(config.to_dict())["workers.max"] == 2
    with pytest.raises(Exception, match="frozen"):
        config.seed = 3  # type: ignore[misc]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["epochs", "batch.size", "workers", "name", "model", "optimizer.lr", "ray", "+x.y", "~seed"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12),
)
def test_any_override_is_accepted_or_refused_in_one_line(key, value):
    refused = ""
    try:
        compose([f"{key}={value}"])
    except ConfigError as error:
        refused = str(error)
    assert "\n" not in refused


def test_completion_knows_groups_keys_and_values(tmp_path):
    assert complete("model=res", ()) == ["model=resnet"]
    assert "optimizer=sgd" in complete("optim", ()) and "optimizer." in complete("optim", ())
    assert "optimizer.momentum=" in complete("optimizer.", ["optimizer=momentum"])
    assert "optimizer.momentum=" not in complete("optimizer.", ["optimizer=adam"])
    assert complete("precision=", ()) == ["precision=fp32", "precision=bf16", "precision=fp16"]
    assert complete("compile=t", ()) == ["compile=true"]
    # with two words no shell ends the argument after the '='
    assert complete("epo", ()) == ["epochs=", "epochs=30.0"]
    assert complete("regr", ())[0] == "regroup.heartbeat_s="
    assert complete("+model.width", ()) == ["+model.width=", "+model.width=128"]
    assert complete("zzz", ()) == [] == complete("zzz.y=", ())
    folder = write(tmp_path, "model/mine.yaml", "# Mine\n_target_: torch.nn.Linear\n")
    assert "model=mine" in complete("model=m", (), [folder])
    # earlier overrides or the folder may be wrong: then there are no words and no error
    assert complete("optimizer.l", ["modle=3"]) == ["optimizer.lr=", "optimizer.lr=0.001"]
    assert complete("model=", (), [str(tmp_path / "none")]) == []


def test_composing_and_completing_load_no_heavy_library(tmp_path):
    script = (
        "import sys\n"
        "from descent.config import compose, groups\n"
        "from descent.config.completion import complete\n"
        "import descent.cli.main\n"
        "groups(), compose(['model=gpt']), complete('optimizer.', ())\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'numpy', 'boto3', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.strip() == "[]"
