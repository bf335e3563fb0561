"""Resuming in the middle of an epoch of 100 million samples: from nothing to the step's sample numbers.

Nothing is replayed: the order is a pure function. Against drawing the epoch's permutation
and cutting it at the step, as a sampler with a list must. By shards too (1,000 of 100,000).
"""

import statistics
import time
import tracemalloc
from collections.abc import Callable

import torch

from tests.bench.measure import Result, rounded

_SAMPLES = 10**8
_BATCH = 256
_STEPS = (1, 123_456, 390_624, 1_000_003)
_TARGET_MS = 10.0


def run() -> list[Result]:
    """Milliseconds over the 10 that are allowed, with the peak memory of the call."""
    from descent.data.layout import layout_of
    from descent.training.input.sampling import SampleOrder

    layout = layout_of([100_000] * 1000, None)
    permuted = _permutation_ms()
    return [
        _measure("resume", lambda: SampleOrder(_SAMPLES, _BATCH, 0), permuted),
        _measure("resume_shards", lambda: SampleOrder(_SAMPLES, _BATCH, 0, layout), permuted),
    ]


def _measure(name: str, fresh: Callable[[], object], permuted_ms: float) -> Result:
    took, peaks = [], []
    for step in _STEPS:
        begin = time.perf_counter()
        fresh().samples_of(step)  # type: ignore[attr-defined]
        took.append(1000 * (time.perf_counter() - begin))
        tracemalloc.start()
        fresh().samples_of(step)  # type: ignore[attr-defined]
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    return Result(
        name,
        max(took) / _TARGET_MS,
        1.0,
        "lower",
        {
            "unit": "ms; other: a list's permutation",
            "descent": rounded(statistics.median(took)),
            "other": rounded(permuted_ms),
            "worst_ms": rounded(max(took)),
            "peak_mb": [rounded(p) for p in peaks],
            "samples": _SAMPLES,
        },
    )


def _permutation_ms() -> float:
    begin = time.perf_counter()
    order = torch.randperm(_SAMPLES, generator=torch.Generator().manual_seed(0))
    order[_BATCH : 2 * _BATCH].tolist()
    return 1000 * (time.perf_counter() - begin)
