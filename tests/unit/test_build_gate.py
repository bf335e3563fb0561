"""The gate: whatever a `_target_` says, only a class that lives under the trusted modules is called."""

import functools
import inspect
import sys

import pytest
import torch

# what a path may wander through, loaded on purpose
import torch.optim.lr_scheduler
import torch.utils.data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from descent.config import build, resolve_target
from descent.config.build import TRUSTED
from descent.errors import ConfigError


def under(name: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in TRUSTED)


def refusal(spec, trusted=()) -> str:
    with pytest.raises(ConfigError) as caught:
        build(spec, trusted, "model")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of the user's, importable for the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written = []

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


FOREIGN = [
    "torch.nn.modules.module.functools.partial",
    "torch.nn.modules.module.functools.reduce",
    "torch.utils.data.dataloader.os.system",
    "torch.utils.data.dataloader.os.path.join",
    "torch.nn.Module.__class__",
    "torch.nn.Module.__init__.__class__",
    "torch.nn.Linear.__mro__.__class__",
    "torch.nn.modules.module.Path",
    "torch.nn.functional.torch.load",
    "torch.nn.torch.hub.load",
    "torch.optim.lr_scheduler.types.FunctionType",
    "descent.data.csv_file.Path",
    "descent.training.preflight.np.load",
    "descent.training.collectives.os.remove",
    "descent.models.gates.torch.classes.load_library",
]


@pytest.mark.parametrize("path", FOREIGN)
def test_an_alias_within_a_trusted_module_is_not_trusted(path):
    assert refusal({"_target_": path}).startswith(f"model._target_={path}: ")
    nested = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": path, "_partial_": True}]}
    assert refusal(nested).startswith(f"model._args_[0]._target_={path}: ")
    deeper = {"_target_": "torch.nn.Linear", "x": {"y": [{"_target_": path}]}}
    assert refusal(deeper).startswith(f"model.x.y[0]._target_={path}: ")


MODULES = sorted(name for name, found in list(sys.modules.items()) if under(name) and found)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_comes_through_the_gate_is_a_class_at_home_under_a_trusted_prefix(data):
    path = data.draw(st.sampled_from(MODULES))
    found = sys.modules[path]
    for _ in range(data.draw(st.integers(1, 3))):
        names = sorted(vars(found)) if hasattr(found, "__dict__") else []
        if not names:
            break
        name = data.draw(st.sampled_from(names))
        found, path = getattr(found, name, None), f"{path}.{name}"
    try:
        passed = resolve_target(path, (), "model._target_")
    except ConfigError as error:
        assert str(error).startswith(f"model._target_={path}: ")  # noqa: PT017
        return
    assert inspect.isclass(passed)
    assert under(passed.__module__)
    assert functools.reduce(getattr, passed.__qualname__.split("."), sys.modules[passed.__module__]) is passed


def test_nothing_outside_the_prefixes_is_imported_at_all(module, tmp_path):
    mark = tmp_path / "mark"
    name = module("leaves_mark", f"open({str(mark)!r}, 'w')\nclass Net: pass\n")
    for path in (f"{name}.Net", f"{name}.x.Net"):
        assert f"if it is yours, add trusted_modules=[{name}]" in refusal({"_target_": path})
    assert not mark.exists() and name not in sys.modules
    assert resolve_target(f"{name}.Net", [name], "model._target_").__name__ == "Net"
    assert mark.exists()


@pytest.mark.parametrize(
    "path",
    [5, None, "", "Linear", "torch..nn", "torch.nn.", "os;system", "torch.nn.Linear()", ["a"]],
)
def test_a_target_that_is_no_path(path):
    assert "needs the form package.module.Class" in refusal({"_target_": path})


def test_a_prefix_is_a_whole_name():
    for path in (
        "torch.nnx.Linear",
        "torch.optimum.X",
        "torchnn.X",
        "torch.load",
        "descent.cli.main.main",
        "descent.tracking.ui.serve",
        "descent.cluster.run.run.Run",
        "builtins.eval",
    ):
        assert "not under the trusted modules" in refusal({"_target_": path})


def test_a_class_that_lies_about_its_home_is_refused(monkeypatch):
    forged = type("Linear", (), {"__module__": "torch.nn.modules.linear"})
    monkeypatch.setattr(torch.nn.modules.linear, "Forged", forged, raising=False)
    path = "torch.nn.modules.linear.Forged"
    assert "outside the trusted modules" in refusal({"_target_": path})
    function = functools.wraps(nn.Linear)(lambda: None)
    monkeypatch.setattr(torch.nn.modules.linear, "Forged", function)
    assert "is not a class" in refusal({"_target_": path})


def test_only_classes_of_torch_but_any_callable_of_the_users_own(module):
    assert "is not a class" in refusal({"_target_": "torch.nn.functional.relu"})
    assert "is a module" in refusal({"_target_": "torch.nn.functional"})
    name = module("makers", "import os, torch\ndef make(n=2): return torch.nn.Linear(n, n)\nSIZE = 3\n")
    made = build({"_target_": f"{name}.make", "n": 3}, [name], "model")
    assert made.in_features == 3
    assert "outside the trusted modules" in refusal({"_target_": f"{name}.os.system"}, [name])
    assert "outside the trusted modules" in refusal({"_target_": f"{name}.torch.load"}, [name])
    # a number's class is Python's own
    assert f"model._target_={name}.SIZE" in refusal({"_target_": f"{name}.SIZE"}, [name])


def test_what_is_built_is_what_was_said():
    spec = {
        "_target_": "torch.nn.Sequential",
        "_args_": [
            {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 3},
            {"_target_": "torch.nn.ReLU"},
        ],
    }
    built = build(spec, (), "model")
    assert isinstance(built, nn.Sequential)
    assert built(torch.zeros(2, 4)).shape == (2, 3)
    partial = build({"_target_": "torch.nn.Linear", "_partial_": True, "in_features": 4}, (), "m")
    assert partial(out_features=2).weight.shape == (2, 4)


WRONG_ARGUMENTS = [
    (
        {"in_featrues": 3, "out_features": 2},
        "model.in_featrues: Linear has no such argument; did you mean model.in_features?",
    ),
    ({"in_features": 3}, "model.out_features: Linear needs it; add +model.out_features=…"),
    ({"in_features": "a", "out_features": 2}, "model: Linear failed: TypeError"),
    ({"in_features": -3, "out_features": 2}, "model: Linear failed: RuntimeError"),
    ({"_args_": 5}, "model._args_=5: must be a list of positional arguments"),
    ({"_partial_": "yes"}, "model._partial_=yes: must be true or false"),
]


@pytest.mark.parametrize(("arguments", "wanted"), WRONG_ARGUMENTS)
def test_arguments_are_refused_by_key(arguments, wanted):
    assert refusal({"_target_": "torch.nn.Linear", **arguments}).startswith(wanted)


BROKEN = {
    "import nosuchmodule_xyz\n": "importing broken failed: ModuleNotFoundError: No module named 'nosuchmodule_xyz' (broken.py, line 1)",
    "\nraise ValueError('two\\nlines')\n": "importing broken failed: ValueError: two lines (broken.py, line 2)",
    "def f(:\n": "importing broken failed: SyntaxError: invalid syntax (broken.py, line 1)",
    "import sys\nsys.exit(3)\n": "importing broken failed: SystemExit: 3 (broken.py, line 2)",
    "class Nett: pass\n": "broken has no 'Net'; did you mean Nett?",
    "class Net:\n  def __init__(self):\n    raise KeyError('mine')\n": "model: Net failed: KeyError: 'mine' (broken.py, line 3)",
    "class Net:\n  def __init__(self):\n    len(5)\n": "model: Net failed: TypeError: object of type 'int' has no len() (broken.py, line 3)",
    "class Net:\n  def __init__(self):\n    exit()\n": "model: Net failed: SystemExit",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_users_broken_module_shows_the_users_own_error_and_line(module, text):
    name = module("broken", text)
    assert BROKEN[text] in refusal({"_target_": f"{name}.Net"}, [name])


def test_a_module_that_is_not_there():
    line = refusal({"_target_": "nowhere_to_be_found.Net"}, ["nowhere_to_be_found"])
    assert "there is no module 'nowhere_to_be_found'" in line
