"""What slots cost one worker: the time of a step with 1, 2, 4 and 8 slots over that with one.

A slot is computed by a forward and a backward of its own, so that its gradient has the same bits
wherever it is computed. More slots let more workers share a batch without another result; each
makes the kernels smaller. Trainers with 1, 2, 4 and 8 slots take turns in one process (`turns.py`).
"""

from tests.bench.measure import Result, progress, result_of
from tests.bench.turns import seconds_a_step

_SLOTS = (2, 4, 8)
_TURNS = 5


def run() -> list[Result]:
    """One result per network and number of slots; the default's (4) at 10 ms as `slots`."""
    results = [result for name in ("1ms", "10ms", "100ms", "resnet") for result in _measure(name)]
    chosen = next(r for r in results if r.name == "slots_10ms_4")
    return [*results, Result("slots", chosen.ratio, None, "lower", chosen.detail)]


def _measure(name: str) -> list[Result]:
    rows = seconds_a_step(name, 1, [[f"slots={n}"] for n in (1, *_SLOTS)], _TURNS)
    results = []
    for index, slots in enumerate(_SLOTS, start=1):
        pairs = [(1e3 * row[index], 1e3 * row[0]) for row in rows]
        unit = f"ms a step; descent: {slots} slots, other: 1"
        results.append(result_of(f"slots_{name}_{slots}", pairs, None, "lower", unit=unit))
        progress(f"{name}: {slots} slots take {results[-1].ratio:.3f} of the time of one")
    return results
