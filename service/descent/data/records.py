"""Records that can't be used, and what is done about them (`data.on_error`)."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from descent.data.base import Indices, Pair
from descent.errors import DataError

Policy = Literal["fail", "skip"]
_TRIES = 1000


class BadRecords(DataError):
    """Samples of a batch that can't be used; the message names the first: file, index, what is wrong."""

    def __init__(self, rows: Sequence[int], message: str) -> None:
        super().__init__(message)
        self.rows = list(rows)
        """Their places in the batch that was asked for."""


def refuse_not_finite(values: Tensor, where: Callable[[int], str]) -> None:
    """Raise BadRecords for rows of a float batch [n, …] that hold NaN or infinity."""
    # A sum is not finite if an entry isn't, and reads the batch once without a mask as large as it.
    if not values.is_floating_point() or bool(values.sum().isfinite()):
        return
    rows = (~values.reshape(len(values), -1).isfinite().all(1)).nonzero()[:, 0].tolist()
    if rows:
        raise BadRecords(rows, f"{where(rows[0])}: holds NaN or infinity: mend or drop it")


def read_good(read: Callable[[Indices], Pair], indices: Indices, num_samples: int, policy: Policy) -> tuple[Pair, int]:
    """A batch, and how many of its samples were replaced.

    With policy "skip" a bad sample i gives way to the first good one of i + 1, i + 2, …
    (modulo the number of samples): a function of i alone, so it is the same for any batch
    and any number of workers, and a neighbour lies in the same shard. With "fail" the first
    bad one ends the run, as BadRecords.
    """
    wanted, replaced = indices, set[int]()
    for _ in range(_TRIES):
        try:
            return read(wanted), len(replaced)
        except BadRecords as bad:
            if policy == "fail":
                raise BadRecords(bad.rows, f"{bad} (data.on_error=skip takes the next good sample instead)") from bad
            last = bad
            replaced.update(bad.rows)
            wanted = np.array(wanted, dtype=np.int64)
            wanted[bad.rows] = (wanted[bad.rows] + 1) % num_samples
    raise DataError(f"data.on_error=skip: {_TRIES} samples in a row can't be used: {last}")
