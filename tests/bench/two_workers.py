"""Samples a second of `descent train workers=2` against DDP under `torchrun` with two processes.

A fully connected network of about 10 ms a step and a small residual network; the same
global batch, data in memory, AdamW and one thread per process on both sides, gloo on the
loopback interface. `descent train` is the real command with tracking and diagnostics on,
`ddp.py` the loop by hand in its fastest form. They take turns (Descent's processes are stopped while the other
runs); the ratio is the median over pairs.
"""

import tempfile
from pathlib import Path

from tests.bench.measure import Result, output_of, progress, result_of, steady, worst
from tests.bench.subjects import SUBJECTS

_SECONDS = 3.0
_PAIRS = 7
_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


def run() -> list[Result]:
    """One result per network, and the worst as `two_workers`."""
    results = [_measure(name) for name in ("10ms", "resnet")]
    return [*results, worst("two_workers", results)]


def _measure(name: str) -> Result:
    subject = SUBJECTS[name]
    pairs = []
    overrides = [*subject.overrides(), "workers=2", "slots=2"]
    with tempfile.TemporaryDirectory() as folder, steady(overrides, Path(folder)) as run:
        for _ in range(_PAIRS):
            ours = run.window(_SECONDS)
            with run.set_aside():
                theirs = _torchrun(name)
            pairs.append((1e3 * subject.batch / ours["ms"], 1e3 * subject.batch / theirs["ms"]))
            progress(f"{name}: {pairs[-1][0]:.0f} against {pairs[-1][1]:.0f} samples/s")
    return result_of(f"two_workers_{name}", pairs, 1.02, "higher", unit="samples/s")


def _torchrun(name: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return output_of([*_TORCHRUN, "tests.bench.ddp", name, "--seconds", str(_SECONDS)], Path(folder))
