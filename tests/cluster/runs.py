"""Real runs through the command line, watched and disturbed from outside."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

DESCENT = str(Path(sys.executable).with_name("descent"))
_DAWDLE = "dawdle"


def slow_network(seconds: float, folder: Path) -> str:
    """The source of a module whose network `Slow` takes this long for each micro-batch of a training.

    folder: where `dawdling` makes it take a second.
    """
    return f"""
import os
import time
import torch
from torch import nn

class Slow(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))

    def forward(self, x):
        if self.training:
            time.sleep(1.0 if os.path.exists({str(folder / _DAWDLE)!r}) else {seconds})
        return super().forward(x)
"""


@contextmanager
def dawdling(folder: Path) -> Iterator[None]:
    """The runs of a `slow_network` hardly move on: what takes its time comes before their end."""
    (folder / _DAWDLE).touch()
    try:
        yield
    finally:
        (folder / _DAWDLE).unlink()


COMMON = [
    "model=custom",
    "trusted_modules=[nets]",
    "epochs=null",
    "workers=2",
    "reduction=exact",
    "batch.size=30",
    "evaluate.every=40",
    "tracking.system_metrics=false",
]


def start(folder: Path, name: str, network: str, *overrides: str) -> subprocess.Popen[str]:
    command = [
        DESCENT,
        "train",
        "--json",
        *COMMON,
        f"model._target_=nets.{network}",
        f"name={name}",
        *overrides,
    ]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def resume(folder: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    """Continue a run as its user would: the name, and once more the modules that it may import."""
    return subprocess.Popen(
        [DESCENT, "train", "--json", f"resume={name}", "trusted_modules=[nets]", *overrides],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, json.loads(out.splitlines()[-1]) if out.strip() else {}, err


def wait_for_step(process: subprocess.Popen[str], folder: Path, name: str, step: int) -> None:
    metrics = folder / ".descent" / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and f"\n[{step}, " in metrics.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"step {step} not reached"
        time.sleep(0.02)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The worker actors' processes, oldest first."""
    found = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name().startswith("ray::Worker")]
    return sorted(found, key=lambda p: (p.create_time(), p.pid))


def members_of(folder: Path, name: str) -> set[str]:
    """Who takes part now, by the run's own word."""
    status = json.loads((folder / ".descent" / "runs" / name / "status.json").read_text())
    return set(status["members"])


def logged_steps(folder: Path, name: str) -> list[int]:
    lines = (folder / ".descent" / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [step for step, _, metrics in map(json.loads, lines) if "train/loss" in metrics]


def incidents_of(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / ".descent" / "runs" / name / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
