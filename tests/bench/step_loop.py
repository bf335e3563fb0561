"""A step of Descent with one worker against the loop by hand, at about 1, 10 and 100 ms a step.

Descent is the real thing: `descent train` with its Ray actor, controller, MLflow on
SQLite and all default diagnostics; the wall time between two steps of the steady state
is divided by their number. The other side is `bare_loop.py` in a process of its own:
the same network, data, global batch and optimizer class with torch's defaults, `.item()`
in every step. One thread each; the two take turns (Descent's processes are stopped while the
other runs), and the ratio is the median over pairs.
`detail` also has the ratios to the bare loop without `.item()` and to one with the fused
kernel, which Descent chooses by itself, and the ratio of CPU times.
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

TARGETS = {"1ms": 1.05, "10ms": 1.02, "100ms": 1.01}
_SECONDS = {"1ms": 3.0, "10ms": 3.0, "100ms": 5.0}
_PAIRS = {"1ms": 9, "10ms": 5, "100ms": 3}
"""The shorter a step, the more of it is chance."""


def run() -> list[Result]:
    """One result per size, and the worst as `step_loop`."""
    results = [_measure(size) for size in TARGETS]
    return [*results, worst("step_loop", results)]


def _measure(size: str) -> Result:
    ours, theirs = [], []
    overrides = [*SUBJECTS[size].overrides(), "workers=1"]
    with tempfile.TemporaryDirectory() as folder, steady(overrides, Path(folder)) as run:
        for index in range(_PAIRS[size]):
            ours.append(run.window(_SECONDS[size]))
            # The two other variants once: they are for the detail.
            variants = "item,no_item,fused" if index == 0 else "item"
            with run.set_aside():
                theirs.append(_bare_loop(size, variants))
            progress(f"{size}: {ours[-1]['ms']:.3f} against {theirs[-1]['item']['ms']:.3f} ms a step")
    pairs = [(o["ms"], t["item"]["ms"]) for o, t in zip(ours, theirs, strict=True)]
    cpu = [o["cpu_ms"] / t["item"]["cpu_ms"] for o, t in zip(ours, theirs, strict=True)]
    return result_of(
        f"step_loop_{size}",
        pairs,
        TARGETS[size],
        "lower",
        unit="ms per step",
        cpu_ratios=[rounded(r) for r in cpu],
        to_no_item=rounded(ours[0]["ms"] / theirs[0]["no_item"]["ms"]),
        to_fused=rounded(ours[0]["ms"] / theirs[0]["fused"]["ms"]),
        cpu_to_fused=rounded(ours[0]["cpu_ms"] / theirs[0]["fused"]["cpu_ms"]),
    )


def _bare_loop(size: str, variants: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return output_of(
            ["-m", "tests.bench.bare_loop", size, "--seconds", str(_SECONDS[size]), "--variants", variants],
            Path(folder),
        )
