"""From the command to the first step: `descent train workers=2` against Ray Train's TorchTrainer.

Measured from outside: the clock starts when the process is created, and stops with the
time stamp of the first step (Descent: its first `train/loss` record; Ray Train: written by
rank 0 right after the optimizer's step). Same network, data and machine, two CPU workers,
a Ray cluster of its own for each. Descent composes and checks its config, opens MLflow and
evaluates the initial model in that time; the other script does none of this.
"""

import tempfile
import time
from pathlib import Path

from tests.bench.measure import (
    PAIRS,
    PATIENCE_S,
    BenchError,
    Result,
    process,
    progress,
    result_of,
    training,
)
from tests.bench.subjects import SUBJECTS

_SUBJECT = "10ms"


def run() -> list[Result]:
    """The one result, in seconds."""
    pairs = []
    for _ in range(PAIRS):
        pairs.append((_descent(), _ray_train()))
        progress(f"{pairs[-1][0]:.1f} against {pairs[-1][1]:.1f} s")
    return [result_of("startup", pairs, 0.5, "lower", unit="s to the first step")]


def _descent() -> float:
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        with training([*SUBJECTS[_SUBJECT].overrides(), "workers=2"], Path(folder)) as run:
            run.wait_for(lambda: run.steps)
            return run.steps[0][1] / 1000 - begin


def _ray_train() -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "first_step.txt"
        begin = time.time()
        with process(["-m", "tests.bench.ray_train", str(out), _SUBJECT], Path(folder)) as child:
            while not (out.exists() and out.read_text()):
                if child.poll() is not None or time.time() - begin > PATIENCE_S:
                    error = (Path(folder) / "stderr.txt").read_text(encoding="utf-8")
                    raise BenchError(f"ray_train took no step:\n{error[-2000:]}")
                time.sleep(0.1)
        return float(out.read_text()) - begin
