"""The gate: a `_target_` builds only a class from the list of public classes, or what the user trusts."""

import functools
import inspect
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from descent.config import build, resolve_target
from descent.config.public_classes import DESCENT_CLASSES, KINDS_BY_GROUP, public_class, torch_classes
from descent.errors import ConfigError


def refusal(spec, trusted=(), where="model") -> str:
    with pytest.raises(ConfigError) as caught:
        build(spec, trusted, where)
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
    # data pipes: building them leads from an object to its __globals__
    "torch.utils.data.datapipes.dataframe.dataframes.CaptureGetAttr",
    "torch.utils.data.datapipes.dataframe.dataframes.CaptureGetItem",
    "torch.utils.data.datapipes.dataframe.dataframes.CaptureCall",
    "torch.utils.data.IterDataPipe",
    "torch.utils.data.DFIterDataPipe",
    "torch.utils.data.DataLoader",
    "torch.nn.DataParallel",
    "torch.nn.Parameter",
    "torch.nn.functional.relu",
    "torch.nn.functional",
    # Descent's own classes that are not meant for a config
    "descent.training.collectives.Store",
    "descent.training.trainer.Trainer",
    "descent.data.shards.Shards",
    "descent.storage.s3.S3",
    "descent.cli.main.main",
    "builtins.eval",
    "os.system",
]


@pytest.mark.parametrize("path", FOREIGN)
def test_an_alias_within_a_trusted_module_is_not_trusted(path):
    assert refusal({"_target_": path}).startswith(f"model._target_={path}: ")
    nested = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": path, "_partial_": True}]}
    assert refusal(nested).startswith(f"model._args_[0]._target_={path}: ")
    deeper = {"_target_": "torch.nn.Linear", "x": {"y": [{"_target_": path}]}}
    assert refusal(deeper).startswith(f"model.x.y[0]._target_={path}: ")


IN_FULL = """
import contextlib, importlib, inspect, io, os, pkgutil, sys, warnings
import torch
from descent.config.public_classes import public_class, torch_classes

warnings.simplefilter("ignore")
listed = set(torch_classes())

def names(folders, prefix):
    for info in pkgutil.iter_modules(folders):
        if info.name not in ("__main__", "testing"):
            yield f"{prefix}.{info.name}"
            if info.ispkg:
                yield from names([os.path.join(f, info.name) for f in folders], f"{prefix}.{info.name}")

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    for name in names(list(torch.__path__), "torch"):
        with contextlib.suppress(BaseException):
            importlib.import_module(name)

paths = 0
for module_name, module in list(sys.modules.items()):
    if module_name.split(".")[0] != "torch" or not inspect.ismodule(module):
        continue
    for name, value in list(vars(module).items()):
        inner = list(vars(value)) if inspect.ismodule(value) or inspect.isclass(value) else ()
        for path in (f"{module_name}.{name}", *(f"{module_name}.{name}.{n}" for n in inner)):
            paths += 1
            found = public_class(path)
            assert (found is not None) == (path in listed), path
            if found is not None:
                assert isinstance(found.cls, type), path
                assert issubclass(
                    found.cls,
                    (torch.nn.Module, torch.optim.Optimizer, torch.utils.data.Dataset, torch.utils.data.Sampler),
                ), path
                assert "datapipes" not in found.cls.__module__, path
print(paths)
"""


def test_of_everything_importable_under_torch_only_the_listed_classes_pass():
    done = subprocess.run([sys.executable, "-c", IN_FULL], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 200_000


MODULES = sorted(n for n, found in list(sys.modules.items()) if n.split(".")[0] in ("torch", "descent") and found)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_path_leads_there_only_a_listed_class_passes(data):
    path = data.draw(st.sampled_from(MODULES))
    found = sys.modules[path]
    for _ in range(data.draw(st.integers(1, 3))):
        names = sorted(vars(found)) if hasattr(found, "__dict__") else []
        if not names:
            break
        name = data.draw(st.sampled_from(names))
        found, path = getattr(found, name, None), f"{path}.{name}"
    try:
        passed = resolve_target(path, (), "_target_")
    except ConfigError as error:
        assert str(error).startswith(f"_target_={path}: ")  # noqa: PT017
        return
    assert inspect.isclass(passed)
    assert public_class(path).cls is passed


# Python reports these events to audit hooks: processes, sockets, files.
SUSPICIOUS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "subprocess.", "socket.", "shutil.")
HOSTILE = ["os.system", "__import__('os').system('true')", "/etc/hostname", "antigravity", "torch.load"]
_events: list[str] | None = None


def _record(event: str, arguments: tuple[object, ...]) -> None:
    if _events is not None:
        by_string = event in ("open", "import", "compile", "exec") and any(a in HOSTILE for a in arguments)
        if by_string or event.startswith(SUSPICIOUS):
            _events.append(f"{event} {arguments!r:.120}")


sys.addaudithook(_record)


@pytest.mark.parametrize("path", sorted(n for n, found in torch_classes().items() if n.count(".") < 4))
def test_a_listed_class_uses_no_string_as_a_module_a_file_or_code(path):
    global _events
    named = [
        p
        for p in inspect.signature(public_class(path).cls).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    # small sizes, so that a network is built in no time
    small = {p.name: 4 for p in named if p.default is p.empty or (type(p.default) is int and p.default > 4)}
    for text in HOSTILE:
        for arguments in (
            *({**small, parameter.name: text} for parameter in named),
            {"_args_": [text]},
            {"_args_": [[text]], "_partial_": True},
        ):
            _events = []
            try:
                build({"_target_": path, **arguments}, (), "x")
            except ConfigError:
                pass
            finally:
                seen, _events = _events, None
            assert seen == [], arguments


def test_a_class_is_built_only_where_its_kind_belongs():
    for group, kinds in KINDS_BY_GROUP.items():
        for path, listed in torch_classes().items():
            if listed.kind in kinds:
                assert resolve_target(path, (), f"{group}._target_") is listed.cls
            else:
                with pytest.raises(ConfigError, match=f"is a class of kind '{listed.kind}'"):
                    resolve_target(path, (), f"{group}._target_")
    # an argument may be a module anywhere: a data set's transform
    assert resolve_target("torch.nn.Flatten", (), "data.train.transform._target_") is nn.Flatten
    with pytest.raises(ConfigError, match="is a class of kind 'optimizer'"):
        resolve_target("torch.optim.SGD", (), "model.x._target_")


def test_descents_own_list_names_classes_that_exist():
    for kind, paths in DESCENT_CLASSES.items():
        for path in paths:
            assert public_class(path).kind == kind


def test_an_error_never_shows_the_object_that_a_path_leads_to(module, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2-secret")
    name = module("leaky", "import os\nfrom os import environ\nKEY = 'hunter2-secret'\nKEYS = {'a': KEY}\n")
    for path in (
        "torch.nn.modules.module.torch.os.environ.x",
        f"{name}.environ.x",
        f"{name}.environ",
        f"{name}.os.environ.x",
        f"{name}.KEY",
        f"{name}.KEY.x",
        f"{name}.KEYS.x",
        f"{name}.KEYS",
        f"{name}.os.__dict__.x",
    ):
        assert "hunter2" not in refusal({"_target_": path}, [name])
    assert "hunter2" not in refusal({"_target_": {"a": "hunter2-secret"}}, [name])
    assert "hunter2" not in refusal({"_target_": "torch.nn.ReLU", "_args_": {"a": "hunter2-secret"}})
    assert "hunter2" not in refusal({"_target_": "torch.nn.ReLU", "_partial_": ["hunter2-secret"]})


@pytest.mark.parametrize("name", ["statistics", "colorsys", "yaml"])
def test_a_trusted_module_with_the_name_of_an_installed_one_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.py").write_text("raise SystemExit('executed')\n")
    line = refusal({"_target_": f"{name}.Net"}, [name])
    assert f"{name}.py in this folder has the name of an installed module" in line and "rename yours" in line


def test_no_module_that_is_not_trusted_is_imported(module, tmp_path):
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
        assert "not under the trusted modules" in refusal({"_target_": path}, ["torch.n", "descent.cl", "builtin"])


def test_a_class_that_forges_its_module_is_refused(monkeypatch):
    forged = type("Linear", (), {"__module__": "torch.nn.modules.linear"})
    monkeypatch.setattr(torch.nn.modules.linear, "Forged", forged, raising=False)
    assert "is not a public class" in refusal({"_target_": "torch.nn.modules.linear.Forged"})
    function = functools.wraps(nn.Linear)(lambda: None)
    monkeypatch.setattr(torch.nn.modules.linear, "Forged", function)
    assert "is not a public class" in refusal({"_target_": "torch.nn.modules.linear.Forged"})


def test_only_classes_of_torch_but_any_callable_of_the_users_own(module):
    assert "is not a public class" in refusal({"_target_": "torch.nn.functional.relu"})
    name = module("makers", "import os, torch\ndef make(n=2): return torch.nn.Linear(n, n)\nSIZE = 3\n")
    made = build({"_target_": f"{name}.make", "n": 3}, [name], "model")
    assert made.in_features == 3
    assert build({"_target_": f"{name}.torch.nn.ReLU"}, [name], "model").inplace is False
    assert "outside the trusted modules" in refusal({"_target_": f"{name}.os.system"}, [name])
    assert "outside the trusted modules" in refusal({"_target_": f"{name}.torch.load"}, [name])
    assert "internal name of Python" in refusal({"_target_": f"{name}.make.__globals__"}, [name])
    assert "is a module" in refusal({"_target_": f"{name}.os"}, [name])
    # the type of a number is Python's own
    assert f"model._target_={name}.SIZE" in refusal({"_target_": f"{name}.SIZE"}, [name])


def test_the_object_built_is_the_one_that_the_spec_describes():
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
