"""The deployment files, read once, for the tests that hold them to what exists."""

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(line.split("==", 1) for line in (ROOT / "requirements.lock").read_text().split() if "==" in line)
IMAGE = f"descent-service:{PROJECT['version']}"

COMPOSE_TEXT = (DEPLOY / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]
RAYJOB: dict[str, Any] = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
CLAIM: dict[str, Any] = yaml.safe_load((DEPLOY / "claim.yaml").read_text())
CLUSTER: dict[str, Any] = RAYJOB["spec"]["rayClusterSpec"]
README = (DEPLOY / "README.md").read_text()


def run(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program in the checkout and keep what it prints."""
    return subprocess.run(args, capture_output=True, text=True, env=env, cwd=ROOT, timeout=120)
