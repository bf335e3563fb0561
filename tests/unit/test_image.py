"""The Dockerfile: it copies what exists, installs from the lock, and ends without root.

No engine builds it here, so its instructions are read, and the two that can run anywhere do.
"""

import fnmatch
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.unit.deploy_files import (
    DEPLOY,
    IMAGE,
    LOCK,
    PROJECT,
    README,
    ROOT,
    SERVICES,
    run,
)


def _instructions() -> list[tuple[str, str]]:
    """Dockerfile instructions in order, continuation lines joined, comments dropped."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n", " ", text)
    return [(w[0], w[1]) for w in (line.split(None, 1) for line in joined.splitlines()) if w]


def _ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out: the last pattern that matches decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            top = path.split("/")[0]
            if fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(top, pattern):
                verdict = not line.startswith("!")
    return verdict


def _copied() -> set[str]:
    """What the Dockerfile takes from the checkout."""
    found: set[str] = set()
    for name, rest in _instructions():
        if name == "COPY" and "--from" not in rest:
            *sources, _target = rest.split()
            found |= {s.removeprefix("./") for s in sources}
    return found


def test_the_image_copies_what_exists_and_nothing_private() -> None:
    copied = _copied()
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not _ignored(source), source
    project = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml"}
    assert copied == project | {"requirements.lock", "service", "configs"}
    assert all(_ignored(p) for p in ("deploy/.env", ".git/config", ".venv/bin/python", "tests"))


def test_the_wheel_builds_from_what_the_image_copies(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in _copied():
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, source / name)
    step = next(r for n, r in _instructions() if n == "RUN" and r.startswith("pip wheel "))
    words = step.replace("/wheels", str(tmp_path / "wheels")).split()
    result = subprocess.run([sys.executable, "-m", *words], cwd=source, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {"descent/cli/main.py", "descent/configs/config.yaml"} <= inside
    assert all((ROOT / "service" / n).exists() for n in inside if n.startswith("descent/") and ".py" in n)


def test_the_image_uses_its_arguments_and_the_lock() -> None:
    instructions = _instructions()
    text = "\n".join(rest for name, rest in instructions if name != "ARG")
    arguments = [rest.split("=")[0] for name, rest in instructions if name == "ARG"]
    assert arguments == ["VARIANT", "TORCH_INDEX"]
    assert set(SERVICES["head"]["build"]["args"]) == set(arguments)
    assert all(f"${{{a}" in text for a in arguments)
    installs = [r for n, r in instructions if n == "RUN" and "pip install" in r]
    assert len(installs) == 3
    assert all("--constraint requirements.lock" in r for r in installs)
    assert {"torch", "ray", "mlflow", "hatchling", "psycopg", "psycopg-binary"} <= set(LOCK)
    assert "postgres" in PROJECT["optional-dependencies"]
    base = next(r for n, r in instructions if n == "FROM")
    assert re.match(r"python:3\.11\.\d+-slim-\w+ AS base$", base), "pinned to a full version"


def test_the_lock_holds_every_dependency_of_the_image() -> None:
    """Constraints pin only what they name: one that is missing would float."""
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["postgres"]]
    names = {re.split(r"[\[<>=~ ]", w)[0].lower() for w in wanted}
    assert names <= {name.lower() for name in LOCK}


def test_the_image_ends_without_root_and_without_an_entrypoint() -> None:
    instructions = _instructions()
    last = max(i for i, (name, _) in enumerate(instructions) if name == "FROM")
    final = instructions[last:]
    users = [rest for name, rest in final if name == "USER"]
    assert users == ["10001:10001"]
    after = [name for name, _ in final[final.index(("USER", users[0])) + 1 :]]
    assert after == ["WORKDIR", "HEALTHCHECK", "CMD"]
    assert ("HEALTHCHECK", "NONE") in final
    assert all(name != "ENTRYPOINT" for name, _ in instructions)
    environment = dict(w.split("=", 1) for n, r in final if n == "ENV" for w in r.split())
    assert environment == {
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
    }
    from ray._common.usage.usage_constants import USAGE_STATS_ENABLED_ENV_VAR

    assert USAGE_STATS_ENABLED_ENV_VAR in environment


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_image_refuses_the_wrong_kind_of_torch(variant: str) -> None:
    import torch

    step = next(r for n, r in _instructions() if n == "RUN" and "version.py" in r)
    check = re.search(r'python -c "(.*)"', step)
    assert check
    result = run(sys.executable, "-c", check[1].replace("${VARIANT}", variant))
    kind = "cuda" if torch.version.cuda else "cpu"
    assert (result.returncode == 0) == (variant == kind)
    if variant != kind:
        assert "set TORCH_INDEX" in result.stderr


def test_our_image_has_one_name_and_one_builder() -> None:
    own = {name: s for name, s in SERVICES.items() if s["image"] == IMAGE}
    assert set(own) == {"head", "worker", "mlflow"}
    assert [name for name, s in own.items() if "build" in s] == ["head"]
    context = (DEPLOY / SERVICES["head"]["build"]["context"]).resolve()
    assert (context / "Dockerfile").is_file()
    for name, service in SERVICES.items():
        tag = service["image"].rpartition(":")[2]
        assert re.match(r"\d+\.\d+", tag), f"{name}: an image is pinned to a full version"
    assert f"-t {IMAGE}" in README
