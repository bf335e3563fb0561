"""Peak resident set of a Descent worker against the process of the loop by hand.

Both train the same network on the same data for a while; Descent's figure is the
worker actor's `peak_rss_mb` in the summary of `descent train`, final evaluation and
checkpoint included, the other one is the whole process's VmHWM. A small and a larger network,
because a fixed part (torch, Ray) and one that grows with the parameters make up the sum.
"""

import tempfile
from pathlib import Path

from tests.bench.measure import Result, descent, output_of, progress, result_of
from tests.bench.subjects import SUBJECTS

_STEPS = 50


def run() -> list[Result]:
    """One result per network; the issue states no target. The larger ratio is `memory`."""
    results = [_measure(name) for name in ("10ms", "100ms")]
    largest = max(results, key=lambda r: r.ratio)
    detail = {r.name: r.detail for r in results}
    return [*results, Result("memory", largest.ratio, None, "lower", detail)]


def _measure(name: str) -> Result:
    pairs, parameters = [], 0
    for _ in range(2):  # memory hardly varies
        with tempfile.TemporaryDirectory() as folder:
            ours = descent([*SUBJECTS[name].overrides(), "workers=1", f"steps={_STEPS}"], Path(folder))
            theirs = output_of(["-m", "tests.bench.bare_loop", name], Path(folder))
            pairs.append((ours["peak_rss_mb"], theirs["peak_rss_mb"]))
            parameters = theirs["parameters"]
        progress(f"{name}: {pairs[-1][0]:.0f} against {pairs[-1][1]:.0f} MiB")
    return result_of(f"memory_{name}", pairs, None, "lower", unit="MiB", parameters=parameters)
