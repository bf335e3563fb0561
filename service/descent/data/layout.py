"""How the samples of a data set are spread over its shards."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from descent.data.batch import Indices
from descent.errors import DataError

_WINDOW_SHARDS = 8


@dataclass(frozen=True)
class Layout:
    """The shards of a data set, for a sample order that needs few shards at a time.

    starts: [num_shards + 1], the number of the first sample of each shard, then the number of samples.
    window: the shards are shuffled and laid end to end; then each stretch of `window` samples is
    shuffled by itself.
    """

    starts: Indices
    window: int


def layout_of(counts: Iterable[int], window: int | None) -> Layout:
    """The layout of shards that hold `counts` samples; a window of None spans 8 average shards.

    Raises DataError for a window below 1.
    """
    starts = np.concatenate([[0], np.cumsum(np.fromiter(counts, np.int64))]).astype(np.int64)
    if window is not None and window < 1:
        raise DataError(f"data.window={window}: give the samples to shuffle at a time, 1 or more")
    average = math.ceil(int(starts[-1]) / max(1, len(starts) - 1))
    return Layout(starts, window or max(1, _WINDOW_SHARDS * average))
