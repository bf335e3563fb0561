"""Ctrl-C, SIGTERM, a closed terminal, a closed pipe, SIGKILL and resume, as a user meets them: real processes, the embedded store."""

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from descent.cluster.run.left_over import settle_left_over

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
TRUST = "trusted_modules=[slow]"
RUN = [
    "model=custom",
    "model._target_=slow.Slow",
    TRUST,
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

    def __init__(self, folder: Path, overrides: list[str], *, terminal: bool = False) -> None:
        """terminal: run it in a terminal of its own, which `hang_up` closes."""
        self.mark = secrets.token_hex(8)
        self.folder = folder
        self.master, slave = os.openpty() if terminal else (-1, subprocess.PIPE)
        self.process = subprocess.Popen(
            # `script`-like: the new session takes the terminal on its stderr as its own.
            [sys.executable, "-c", _OWN_TERMINAL, DESCENT, "train", "--json", *overrides],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=slave,
            text=True,
            env={**os.environ, "DESCENT_TEST_MARK": self.mark},
            start_new_session=True,
        )
        if terminal:
            os.close(slave)

    def hang_up(self, name: str, step: int) -> None:
        """Close the terminal, once `step` is logged: the kernel sends SIGHUP, and nothing can be shown any more."""
        self.wait_for(name, step, shown=self.master)
        os.close(self.master)

    def interrupt(self, number: signal.Signals, name: str, step: int) -> None:
        """Send the signal to the process group, as a terminal or a service manager does, once `step` is logged."""
        self.wait_for(name, step)
        os.killpg(self.process.pid, number)

    def wait_for(self, name: str, step: int, shown: int = -1) -> None:
        """Wait until `step` is logged. shown: a terminal to read, so that it doesn't fill up."""
        metrics = self.folder / ".descent" / "runs" / name / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and f"\n[{step}, " in metrics.read_text()):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, f"step {step} not reached"
            if shown >= 0 and select.select([shown], [], [], 0)[0]:
                os.read(shown, 65536)
            time.sleep(0.02)

    def end(self) -> tuple[int, dict[str, Any], str]:
        """(exit code, summary, what went to stderr); asserts that nothing is left behind."""
        out, err = self.process.communicate(timeout=200)
        assert self.left_behind() == []
        return self.process.returncode, json.loads(out.splitlines()[-1]) if out.strip() else {}, err

    def left_behind(self) -> list[str]:
        """Command lines of the processes that this training has started and that are still there."""
        return [" ".join(process.cmdline()) for process in self._processes()]

    def end_what_is_left(self) -> None:
        """Ray's processes, of which the killed one could not take leave."""
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("DESCENT_TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


_OWN_TERMINAL = """
import fcntl, os, sys, termios
if os.isatty(2):
    fcntl.ioctl(2, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


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


@pytest.mark.timeout(900)
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

    second = Training(tmp_path, ["resume=cut", TRUST])
    second.interrupt(signal.SIGTERM, "cut", stopped["step"] + 20)
    code, again, err = second.end()
    assert (code, again["state"]) == (130, "KILLED"), err
    assert stopped["step"] < again["step"] < STEPS
    assert again["run_id"] == stopped["run_id"]

    third = Training(tmp_path, ["resume=cut", TRUST], terminal=True)
    third.hang_up("cut", again["step"] + 5)
    code, hung_up, err = third.end()
    assert (code, hung_up["state"]) == (130, "KILLED")
    assert again["step"] < hung_up["step"] < STEPS
    assert Path(hung_up["checkpoint"]).name == f"step-{hung_up['step']:08d}"

    fourth = Training(tmp_path, ["resume=cut", TRUST])
    fourth.wait_for("cut", hung_up["step"] + 3)
    busy = subprocess.run(
        [DESCENT, "train", "resume=cut", TRUST], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert busy.returncode == 2
    assert busy.stderr.startswith(f"error: resume=cut: the run is being trained by process {fourth.process.pid} on ")
    deadline = time.monotonic() + 60  # tracking is opened again beside the first steps
    while mlflow_run(tmp_path, stopped["run_id"])[0] != "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.1)
    fourth.process.kill()  # without a chance to save or to say anything
    fourth.process.communicate()
    assert mlflow_run(tmp_path, stopped["run_id"])[0] == "RUNNING"
    fourth.end_what_is_left()
    lines = list(settle_left_over(tmp_path / ".descent", None, f"sqlite:///{tmp_path / '.descent' / 'mlflow.db'}"))
    assert lines == ["cut: its process ended without a word; it is FAILED now, and resume=cut goes on with it"]
    assert mlflow_run(tmp_path, stopped["run_id"])[0] == "FAILED"

    (tmp_path / "LINGER").unlink()
    last = Training(tmp_path, [f"resume={stopped['run_id']}", "workers=1", TRUST])
    assert last.process.stderr is not None
    last.process.stderr.close()  # as `| head` does: whoever reads goes away
    last.process.stderr = None
    code, done, err = last.end()
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
