"""Ctrl-C, SIGTERM and resume, as a user meets them: real processes, the embedded store."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

DESCENT = str(Path(sys.executable).with_name("descent"))
STEPS = 150
SLOW = """
import os
import time
from torch import nn

class Slow(nn.Sequential):
    '''Small, with dropout and batch norm; slow after as many steps of its process as the file LINGER says.'''

    calls = 0

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))

    def forward(self, x):
        if self.training:
            self.calls += 1
            lingers = os.path.exists("LINGER") and self.calls > int(open("LINGER").read())
            time.sleep(0.5 if lingers else 0.02)
        return super().forward(x)
"""
RUN = [
    "model=custom",
    "model._target_=slow.Slow",
    "trusted_modules=[slow]",
    f"steps={STEPS}",
    "epochs=null",
    "workers=2",
    "reduction=exact",
    "batch.size=30",
    "evaluate.every=50",
    "ema.decay=0.9",
    "tracking.system_metrics=false",
]


class Training:
    """A `descent train --json` process that can be interrupted at a step."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.mark = secrets.token_hex(8)
        self.folder = folder
        self.process = subprocess.Popen(
            [DESCENT, "train", "--json", *overrides],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "DESCENT_TEST_MARK": self.mark},
            start_new_session=True,
        )

    def interrupt(self, number: signal.Signals, name: str, step: int) -> None:
        """Send the signal to the process group, as a terminal or a service manager does, once `step` is logged."""
        metrics = self.folder / ".descent" / "runs" / name / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and f"\n[{step}, " in metrics.read_text()):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, f"step {step} not reached"
            time.sleep(0.02)
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, dict[str, Any], str]:
        """(exit code, summary, what went to stderr); asserts that nothing is left behind."""
        out, err = self.process.communicate(timeout=200)
        assert self.left_behind() == []
        return self.process.returncode, json.loads(out.splitlines()[-1]) if out.strip() else {}, err

    def left_behind(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("DESCENT_TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found


def mlflow_run(folder: Path, run_id: str) -> tuple[str, dict[str, list[int]], dict[str, float]]:
    """(status, metric -> its logged steps, last loss by step) as MLflow's own client reads them."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / '.descent' / 'mlflow.db'}")
    run = client.get_run(run_id)
    steps = {
        key: sorted(p.step for p in client.get_metric_history(run_id, key))
        for key in ("train/loss", "eval/loss", "train/learning_rate")
    }
    losses = {str(p.step): p.value for p in client.get_metric_history(run_id, "train/loss")}
    return run.info.status, steps, losses


@pytest.mark.timeout(600)
def test_stopped_twice_and_resumed_with_other_workers_it_ends_as_if_nothing_had_happened(
    tmp_path: Path,
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    code, whole, err = Training(tmp_path, [*RUN, "name=whole"]).end()
    assert code == 0, err

    (tmp_path / "LINGER").write_text("25")  # it must not be over before the signal comes
    first = Training(tmp_path, [*RUN, "name=cut"])
    first.interrupt(signal.SIGINT, "cut", 30)
    code, stopped, err = first.end()
    assert (code, stopped["state"]) == (130, "KILLED"), err
    assert 30 <= stopped["step"] < STEPS
    assert Path(stopped["checkpoint"]).name == f"step-{stopped['step']:08d}"
    assert mlflow_run(tmp_path, stopped["run_id"])[0] == "KILLED"

    second = Training(tmp_path, ["resume=cut"])
    second.interrupt(signal.SIGTERM, "cut", stopped["step"] + 20)
    code, again, err = second.end()
    assert (code, again["state"]) == (130, "KILLED"), err
    assert stopped["step"] < again["step"] < STEPS
    assert again["run_id"] == stopped["run_id"]

    (tmp_path / "LINGER").unlink()
    code, done, err = Training(tmp_path, [f"resume={stopped['run_id']}", "workers=1"]).end()
    assert (code, done["state"], done["step"]) == (0, "FINISHED", STEPS), err
    assert done["run_id"] == stopped["run_id"]
    assert done["state_sha256"] == whole["state_sha256"]
    for figure in ("train/loss", "eval/loss", "eval/accuracy"):
        assert done[figure] == whole[figure]
    status, steps, losses = mlflow_run(tmp_path, done["run_id"])
    assert status == "FINISHED"
    assert steps["train/loss"] == steps["train/learning_rate"] == list(range(1, STEPS + 1))
    assert steps["eval/loss"] == [0, 50, 100, 150]
    assert losses == mlflow_run(tmp_path, whole["run_id"])[2]
