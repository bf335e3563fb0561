"""Parquet files: columns of numbers, read row group by row group."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from descent.data.bad_records import BadRecords, Policy, refuse_not_finite
from descent.data.base import BatchDataset, Indices, Pair, check_indices, digest_of
from descent.data.layout import layout_of
from descent.data.row_cache import RowGroupCache, check_memory, memory_bytes
from descent.data.row_groups import RowGroups
from descent.errors import DataError

_NO_CLASS = int(np.iinfo(np.int64).min)
"""Stands for a target that can't be used, where such a row is to be skipped."""


class Parquet(BatchDataset):
    """inputs float32 [n, columns] (or [n, *shape] of one list column); targets int64 [n] or float32 [n, 1].

    path: a .parquet file, a folder of them (in the order of their names), or an s3:// address of a file
    or of a folder with the index that `descent data index` writes.
    features: the input columns; null for all columns but the target.
    targets_are: 'classes' or 'values'; null decides by the target's type: whole numbers and text are
    classes (text in sorted order), floats are values.
    on_error: with 'skip', a row with a NaN, an empty cell or an unusable target is a bad record, also in
    a table in memory; with 'fail', such a table in memory is refused at once.

    A table of at most `memory_mb` as floats is held in memory and shuffled freely. A larger table is read
    by row groups, in an order that shuffles the row groups and then the samples inside each `window` (a
    number of samples; null: as many as 8 row groups hold). The rows of two windows and four groups are
    cached as floats; a table for which that is more than half of the memory is refused.

    Raises DataError naming file, column and row group.
    """

    def __init__(
        self,
        path: str | None = None,
        target: str | None = None,
        features: list[str] | None = None,
        shape: list[int] | None = None,
        targets_are: str | None = None,
        num_outputs: int | None = None,
        memory_mb: float = 1024.0,
        window: int | None = None,
        on_error: Policy = "fail",
        name: str = "parquet",
    ) -> None:
        if path is None:
            raise DataError("data.path is not set: give data.path=FILE.parquet, or a folder")
        if target is None:
            raise DataError("data.target is not set: give the column to predict, data.target=NAME")
        if targets_are not in (None, "classes", "values"):
            raise DataError(f"data.targets_are={targets_are!r} is neither classes nor values")
        self.name, self.source, self._target, self._on_error = name, path, target, on_error
        self._groups = RowGroups(path)
        self.features = self._groups.columns(features, target)
        self._starts = layout_of(self._groups.counts, None).starts
        if len(self) == 0:
            raise DataError(f"{path}: no rows")
        kind = self._groups.schema.field(target).type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not (text or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise DataError(f"{path}, column {target!r}: is of type {kind}, give numbers or text")
        self.targets_are = targets_are or ("values" if pa.types.is_floating(kind) else "classes")
        self.class_names = tuple(self._groups.distinct(target)) if text else None
        first = self._read(0)[0] if self._groups.counts[0] else torch.zeros(0, 0)
        self._shape = self._shaped(shape, first.shape[1])
        self.input_shape = tuple(self._shape)
        self.num_outputs = self._outputs(num_outputs)
        floats = len(self) * math.prod(self._shape) * 4
        self._all: Pair | None = None
        self.in_memory = floats <= memory_mb * 2**20 and window is None
        if self.in_memory:
            parts = [self._read_alike(g) for g in range(len(self._groups.counts))]
            self._all = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
            if on_error == "fail":
                self._refuse_bad(self._all, np.arange(len(self), dtype=np.int64))
        else:
            self.layout = layout_of(self._groups.counts, window)
            self._groups.files.check_room(self.layout)
            self.files = self._groups.files.local
            # The rows of this window and of the next, each with a part of a row group at both ends.
            rows = min(len(self), 2 * self.layout.window + 4 * max(self._groups.counts))
            check_memory(path, rows, 4 * math.prod(self._shape), memory_bytes())
            self._cache = RowGroupCache(self._read_alike, self._starts, rows)

    def _shaped(self, shape: list[int] | None, width: int) -> list[int]:
        if shape is not None and math.prod(shape) != width:
            raise DataError(f"data.shape={shape}: takes {math.prod(shape)} values, a row has {width}")
        return shape or [width]

    def _outputs(self, given: int | None) -> int:
        if self.targets_are == "values":
            return 1
        found = len(self.class_names or ()) or self._groups.highest(self._target) + 1
        if given is not None and given < found:
            raise DataError(
                f"{self.source}, column {self._target!r}: class {found - 1} is not below num_outputs={given}"
            )
        return given or found

    @property
    def digest(self) -> str:
        settings = f"{self.features} {self._target} {self._shape} {self.targets_are} {list(self.class_names or ())}"
        return digest_of([], settings, self._groups.digest)

    def stored(self) -> Pair | None:
        return self._all

    def decode(self, inputs: Tensor, targets: Tensor) -> Pair:
        return inputs.view(len(inputs), *self._shape), targets

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Pair:
        inputs, targets = self.gather(np.array([index], dtype=np.int64))
        return inputs[0], targets[0]

    def prefetch(self, shards: Indices) -> None:
        """Fetch the files of these row groups and decode the groups in the background, in this order."""
        files = dict.fromkeys(self._groups.file_of[group] for group in shards.tolist())
        self._groups.files.prefetch(files)
        if self._all is None:
            self._cache.prefetch(shards.tolist())

    def gather(self, indices: Indices) -> Pair:
        """Inputs [n, *input_shape] and targets; BadRecords names file, row group and row."""
        check_indices(indices, len(self))
        if self._all is not None:
            at = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
            inputs, targets = (part.index_select(0, at) for part in self._all)
        else:
            inputs, targets = self._cache.gather(indices)
        self._refuse_bad((inputs, targets), indices)
        return self.decode(inputs, targets)

    def _refuse_bad(self, pair: Pair, indices: Indices) -> None:
        inputs, targets = pair

        def where(row: int) -> str:
            return self._location(int(indices[row]))

        refuse_not_finite(inputs, where)
        if targets.is_floating_point():
            refuse_not_finite(targets, where)
        elif bool((targets == _NO_CLASS).any()):
            rows = (targets == _NO_CLASS).nonzero()[:, 0].tolist()
            raise BadRecords(f"{where(rows[0])}, column {self._target!r}: has no usable target", rows)

    def _location(self, sample: int) -> str:
        group = int(np.searchsorted(self._starts, sample, side="right")) - 1
        file, within = self._groups.place(group)
        return f"{file}, row group {within}, row {sample - int(self._starts[group])} (from 0)"

    def _read_alike(self, group: int) -> Pair:
        inputs, targets = self._read(group)
        width = math.prod(self._shape)
        if len(inputs) and inputs.shape[1] != width:
            where = ", row group ".join(str(x) for x in self._groups.place(group))
            raise DataError(f"{where}: has rows of {inputs.shape[1]} values, the first of {width}")
        return inputs, targets

    def _read(self, group: int) -> Pair:
        table = self._groups.read(group, [*self.features, self._target])
        where = ", row group ".join(str(x) for x in self._groups.place(group))
        columns = [_floats(table.column(n), f"{where}, column {n!r}") for n in self.features]
        x = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
        target = table.column(self._target).combine_chunks()
        if self.targets_are == "values":
            y: npt.NDArray[Any] = _floats(target, f"{where}, column {self._target!r}")
        else:
            y = self._classes(target, f"{where}, column {self._target!r}")
        return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(np.ascontiguousarray(y))

    def _classes(self, column: Any, where: str) -> npt.NDArray[np.int64]:
        missing = column.is_null().to_numpy(zero_copy_only=False)
        if missing.any() and self._on_error == "fail":
            raise DataError(f"{where}, row {missing.argmax()} (from 0): has no target: fill it or drop the row")
        if self.class_names is not None:
            numbers: dict[str | None, int] = {name: i for i, name in enumerate(self.class_names)}
            return np.array([numbers.get(name, _NO_CLASS) for name in column.to_pylist()], dtype=np.int64)
        values = column.fill_null(0).to_numpy(zero_copy_only=False)
        wrong = (values < 0) | (values != np.floor(values)) | ~np.isfinite(values)
        if wrong.any() and self._on_error == "fail":
            row = int(wrong.argmax())
            raise DataError(f"{where}, row {row} (from 0): {values[row]} is not a class: they count from 0")
        return np.where(wrong | missing, _NO_CLASS, np.where(wrong, 0, values).astype(np.int64))


def _floats(column: Any, where: str) -> npt.NDArray[np.float32]:
    """A column as [rows, values in a row]; an empty cell becomes NaN, and so makes a bad record."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        if column.null_count:
            raise DataError(f"{where}: has empty cells in place of lists")
        values = _floats(column.flatten(), where)
        if len(column) and len(values) % len(column):
            raise DataError(f"{where}: has lists of different lengths")
        lengths = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
        if len(lengths) > 1:
            raise DataError(f"{where}: has lists of different lengths ({lengths[0]} and {lengths[-1]})")
        return values.reshape(len(column), -1)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(
            f"{where}: is of type {kind}, give numbers or lists of them, or choose others with data.features"
        )
    if kind == pa.float16():
        column = column.cast(pa.float32())
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinity, and so makes a bad record
        return column.to_numpy(zero_copy_only=False).astype(np.float32)[:, None]
