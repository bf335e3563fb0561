"""A step of Descent with one worker against the loop by hand, at about 1, 10 and 100 ms a step; and at about
10 ms with batches that are dicts and a task of the user's own, and with a model of Hugging Face's.

Descent is the real thing: `descent train` with its Ray actor, controller, MLflow on
SQLite and all default diagnostics; the wall time between two steps of the steady state
is divided by their number, with one slot, since the loop computes its batch in one piece
(`slots.py` has what more of them cost). The other side is `bare_loop.py` in a process of its own with
the same network, data and global batch, in the fastest form that can be written by hand:
the fused kernel of AdamW, no `.item()`, gradients set to None. One thread each; the two take
turns (Descent's processes are stopped while the other runs), and the ratio is the median over
pairs. `detail` also has the ratio to the loop as tutorials write it (AdamW as torch gives it,
`.item()` in every step) and the ratio of CPU times.
"""

import tempfile
from pathlib import Path
from typing import Any

from tests.bench.measure import (
    Result,
    output_of,
    progress,
    result_of,
    rounded,
    steady,
    worst,
)
from tests.bench.subjects import SUBJECTS

TARGETS = {"1ms": 1.05, "10ms": 1.03, "100ms": 1.01, "dict": 1.03, "hugging_face": 1.03}
_SECONDS = {"1ms": 3.0, "10ms": 3.0, "100ms": 5.0, "dict": 3.0, "hugging_face": 3.0}
_PAIRS = {"1ms": 9, "10ms": 5, "100ms": 3, "dict": 5, "hugging_face": 5}
"""The shorter a step, the more of it is chance."""


def run() -> list[Result]:
    """One result per size, and the worst as `step_loop`."""
    results = [_measure(size) for size in TARGETS]
    return [*results, worst("step_loop", results)]


def _measure(size: str) -> Result:
    ours, theirs = [], []
    overrides = [*SUBJECTS[size].overrides(), "workers=1", "slots=1"]
    with tempfile.TemporaryDirectory() as folder, steady(overrides, Path(folder)) as run:
        for index in range(_PAIRS[size]):
            ours.append(run.window(_SECONDS[size]))
            # The other variant once, for the detail.
            variants = "fastest,plain" if index == 0 else "fastest"
            with run.set_aside():
                theirs.append(_bare_loop(size, variants))
            progress(f"{size}: {ours[-1]['ms']:.3f} against {theirs[-1]['fastest']['ms']:.3f} ms a step")
    pairs = [(o["ms"], t["fastest"]["ms"]) for o, t in zip(ours, theirs, strict=True)]
    cpu = [o["cpu_ms"] / t["fastest"]["cpu_ms"] for o, t in zip(ours, theirs, strict=True)]
    return result_of(
        f"step_loop_{size}",
        pairs,
        TARGETS[size],
        "lower",
        unit="ms per step",
        cpu_ratios=[rounded(r) for r in cpu],
        to_plain=rounded(ours[0]["ms"] / theirs[0]["plain"]["ms"]),
    )


def _bare_loop(size: str, variants: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return output_of(
            ["-m", "tests.bench.bare_loop", size, "--seconds", str(_SECONDS[size]), "--variants", variants],
            Path(folder),
        )
