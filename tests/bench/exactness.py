"""What `reduction=exact` costs: its throughput over that of `reduction=fast`, at 2 and at 4 workers.

Both have as many slots as there are workers, and take turns in the same processes (`turns.py`).
With 4 workers two processes share a core where there are only two, on both sides.
"""

from tests.bench.measure import Result, progress, result_of, worst
from tests.bench.subjects import SUBJECTS
from tests.bench.turns import seconds_a_step

_TURNS = 3


def run() -> list[Result]:
    """One result per number of workers, and the worse as `exactness`."""
    results = [_measure(world, name) for name in ("10ms", "resnet") for world in (2, 4)]
    return [*results, worst("exactness", results)]


def _measure(world: int, name: str) -> Result:
    kinds = [[f"slots={world}", f"reduction={kind}"] for kind in ("exact", "fast")]
    batch = SUBJECTS[name].batch
    pairs = [(batch / exact, batch / fast) for exact, fast in seconds_a_step(name, world, kinds, _TURNS)]
    unit = "samples/s; descent: exact, other: fast"
    result = result_of(f"exactness_{name}_{world}", pairs, 0.9, "higher", unit=unit)
    progress(f"{name}, {world} workers: exact at {result.ratio:.3f} of fast")
    return result
