"""Samples that can't be used, and what happens to them (`data.on_error`)."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from descent.data.batch import Batch, Indices
from descent.errors import DataError

Policy = Literal["fail", "skip"]
_TRIES = 1000


FLOAT32_MAX = float(np.finfo(np.float32).max)


class BadRecords(DataError):
    """Some samples of a batch can't be used; the message names the first of them and what is wrong with it."""

    def __init__(self, message: str, rows: Sequence[int] = (0,)) -> None:
        """rows: the places of the bad samples in the batch that was asked for."""
        super().__init__(message)
        self.rows = list(rows)


class KnownBad:
    """The samples of a data set that are known to be unusable before they are read.

    is_bad: [num_samples]. describe: what is wrong with a sample, and where it lies.
    Raises DataError where no sample is usable.
    """

    def __init__(self, is_bad: npt.NDArray[np.bool_], describe: Callable[[int], str]) -> None:
        if is_bad.all():
            raise DataError(f"no sample can be used: {describe(0)}")
        self.is_bad, self._describe = is_bad, describe

    def of(self, rows: Indices) -> "KnownBad | None":
        """The same for a data set of the samples `rows`; None where all of these are usable."""
        is_bad = self.is_bad[rows]
        return KnownBad(is_bad, lambda i: self._describe(int(rows[i]))) if is_bad.any() else None

    def refuse(self, indices: Indices) -> None:
        """Raise BadRecords where a batch of these samples has unusable ones."""
        rows = np.flatnonzero(self.is_bad[indices])
        if len(rows):
            raise BadRecords(self._describe(int(indices[rows[0]])), rows.tolist())


def refuse_not_finite(values: Tensor, where: Callable[[int], str]) -> None:
    """Raise BadRecords for the rows of a float batch [n, ...] that hold NaN or infinity.

    where: the description of a row's sample, for the message.
    """
    # The sum of values is finite only if every value is; it reads the batch once and needs no mask as large.
    if not values.is_floating_point() or bool(values.sum().isfinite()):
        return
    rows = (~values.reshape(len(values), -1).isfinite().all(1)).nonzero()[:, 0].tolist()
    if rows:
        raise BadRecords(f"{where(rows[0])}: holds NaN, infinity or a number beyond float32: mend or drop it", rows)


def read_good(
    read: Callable[[Indices], Batch], indices: Indices, num_samples: int, policy: Policy
) -> tuple[Batch, int]:
    """A batch without bad samples, and how many samples were replaced.

    With policy "skip", a bad sample i is replaced by the first good one of i + 1, i + 2, ...
    (modulo the number of samples). The replacement depends on i alone, so it is the same for any
    batch and any number of workers, and it mostly lies in the same shard. With "fail", the first bad
    sample raises BadRecords.
    """
    wanted, replaced = indices, set[int]()
    for _ in range(_TRIES):
        try:
            return read(wanted), len(replaced)
        except BadRecords as bad:
            if policy == "fail":
                raise BadRecords(f"{bad} (data.on_error=skip takes the next good sample instead)", bad.rows) from bad
            last = bad
            replaced.update(bad.rows)
            wanted = np.array(wanted, dtype=np.int64)
            wanted[bad.rows] = (wanted[bad.rows] + 1) % num_samples
    raise DataError(f"data.on_error=skip: {_TRIES} samples in a row can't be used: {last}")
