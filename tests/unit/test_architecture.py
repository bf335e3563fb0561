"""The house keeps its rules: who imports what, what is said where, and that every choice works."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from descent.config import build, compose, groups, resolve_target
from descent.config.files import config_dir
from descent.data.base import TensorData
from descent.training.objective import Objective
from descent.training.plan import build_model, build_optimizer_for, build_schedule

HOUSE = Path(__file__).resolve().parents[2] / "service" / "descent"
FILES = {str(path.relative_to(HOUSE)): path for path in sorted(HOUSE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

DOORS = {
    "torch.distributed": ("training/collectives.py",),
    "hydra": ("config/",),
    "omegaconf": ("config/",),
    "ray": ("cluster/",),
    "ray.cloudpickle": ("cluster/workers/parcel.py",),
    "mlflow": ("tracking/",),
    "boto3": ("storage/",),
    "botocore": ("storage/",),
    "s3transfer": ("storage/",),
    "matplotlib": ("tracking/plots.py",),
}
"""Outside library -> the only files, or packages, that may import it."""
PICKLES = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
LOADERS = ("torch.load", "torch.save", "torch.jit", "np.load", "numpy.load")


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ""


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("library", DOORS)
def test_an_outside_library_has_its_door(library):
    users = {n for n, t in TREES.items() if any(under(m, library) for m in imports(t))}
    strays = {n for n in users if not n.startswith(DOORS[library])}
    assert not strays
    # `import torch` alone gives torch.distributed too
    if library == "torch.distributed":
        for name, tree in TREES.items():
            used = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert name in DOORS[library] or not any(under(u, library) for u in used), name


def test_nothing_is_pickled():
    for name, tree in TREES.items():
        found = {m for m in imports(tree) for p in PICKLES if under(m, p)}
        called = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for node in called:
            function = dotted(node.func)
            if function in ("np.load", "numpy.load"):
                flags = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                if flags.get("allow_pickle") is not False:
                    found.add(function)
            elif function == "torch.load" and any(
                k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords
            ):
                continue  # nothing in the file runs
            elif any(under(function, bad) for bad in LOADERS) or function in ("eval", "exec"):
                found.add(function)
        assert not found, f"{name}: {found}"


def public(tree: ast.Module) -> Iterator[ast.AST]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def test_every_module_and_everything_public_says_what_it_is():
    silent = [
        f"{name} {node.name}"  # type: ignore[attr-defined]
        for name, tree in TREES.items()
        for node in public(tree)
        if not ast.get_docstring(node)  # type: ignore[arg-type]
    ]
    silent += [n for n, t in TREES.items() if t.body and not ast.get_docstring(t)]
    # the groups of keys of a config are explained where a user reads them, in configs/config.yaml
    explained = {
        f"config/schema.py {n.name}"
        for n in public(TREES["config/schema.py"])
        if isinstance(n, ast.ClassDef) and any(getattr(b, "id", "") == "Section" for b in n.bases)
    }
    assert set(silent) - explained == set()


OPTIONS = [(group, option) for group, options in groups().items() for option in options]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_says_in_a_line_what_it_is(group, option):
    line = groups()[group][option]
    assert 10 < len(line) < 140
    file = config_dir() / group / f"{option}.yaml"
    first = [x for x in file.read_text(encoding="utf-8").splitlines()[:2] if x[:1] == "#"]
    assert line in " ".join(first), "the comment stands on top"


def targets(tree: object) -> Iterator[str]:
    if isinstance(tree, dict):
        if "_target_" in tree:
            yield tree["_target_"]
        for value in tree.values():
            yield from targets(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from targets(value)


def test_every_target_in_the_configs_passes_the_gate():
    found = set()
    for file in config_dir().rglob("*.yaml"):
        raw = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        found |= {path for path in targets(raw) if path != "???"}
    assert len(found) > 30
    for path in sorted(found):
        assert callable(resolve_target(path, (), "_target_"))


CHOICES = [(g, o) for g, o in OPTIONS if o != "custom"]
IMAGES = TensorData(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 1]), num_outputs=3, name="images", source="here")
TOKENS = TensorData(torch.randint(9, (4, 6)), torch.randint(9, (4, 6)), num_outputs=9, name="tokens", source="here")
SMALL = {"gpt_124m": ["model.width=12", "model.layers=1"], "gpt_small": ["model.width=12", "model.layers=1"]}


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_every_option_composes_and_builds(group, option):
    config = compose([f"{group}={option}", *SMALL.get(option, [])]).config
    if group == "model":
        data = TOKENS if option.startswith("gpt") else IMAGES
        output = build_model(config, data)(data.gather(np.arange(4))[0])
        assert output.shape[0] == 4 and output.shape[-1] == data.num_outputs
    elif group == "optimizer":
        model = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3)), torch.nn.LayerNorm(3))
        optimizer = build_optimizer_for(config, model, torch.device("cpu"))
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.rand(2, 3)).square().sum().backward()
        optimizer.step()
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    elif group == "schedule":
        schedule = build_schedule(config, 100)
        assert all(0.0 <= schedule(step) <= 1.0 for step in range(100))
    elif group == "loss":
        objective = Objective.of(build(config.loss, (), "loss"))
        target = torch.tensor([0, 1]) if objective.by_class else torch.rand(2, 3)
        assert objective(torch.rand(2, 3), target).total.dim() == 0


def test_the_command_line_starts_light():
    script = (
        "import sys, descent.cli.main\n"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'hydra', 'pydantic', 'matplotlib', 'boto3'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=HOUSE.parent)
    assert done.stdout.strip() == "[]"
