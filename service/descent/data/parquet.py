"""Parquet files: columns of numbers, read row group by row group."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

from descent.data.base import Indices, Pair, check_inside, digest_of
from descent.data.decoded import DecodedGroups, check_memory, memory_bytes
from descent.data.records import refuse_not_finite
from descent.data.row_groups import RowGroups
from descent.data.shards import Layout, layout_of
from descent.errors import DataError


class Parquet(Dataset[Pair]):
    """inputs float32 [n, columns] (or [n, *shape] of one list column); targets int64 [n] or float32 [n, 1].

    path: a .parquet file, a folder of them (in the order of their names), or s3://… of a file
    or of a folder with the index that `descent data index` writes. features: the input
    columns; null for all but the target. A target of whole numbers or text is a class
    (text in sorted order), one of floats a value; targets_are says so where the type doesn't.

    A table of up to `memory_mb` as floats is held in memory and shuffled freely. A larger one
    is read by row groups, in an order that shuffles row groups and then samples inside a
    `window` (null: 8 row groups' worth); the rows of two windows and four groups are kept as
    floats, and refused where that is more than half of the memory.

    Raises DataError naming file, column and row group; a NaN or an empty cell is a bad record.
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
        name: str = "parquet",
    ) -> None:
        if path is None:
            raise DataError("data.path is not set: give data.path=FILE.parquet, or a folder")
        if target is None:
            raise DataError("data.target is not set: give the column to predict, data.target=NAME")
        if targets_are not in (None, "classes", "values"):
            raise DataError(f"data.targets_are={targets_are!r} is neither classes nor values")
        self.name, self.source, self._target = name, path, target
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
        self.classes = self._groups.distinct(target) if text else []
        first = self._read(0)[0] if self._groups.counts[0] else torch.zeros(0, 0)
        self._shape = self._shaped(shape, first.shape[1])
        self.input_shape = tuple(self._shape)
        self.num_outputs = self._outputs(num_outputs)
        floats = len(self) * math.prod(self._shape) * 4
        self._all: Pair | None = None
        self.layout: Layout | None = None
        if floats <= memory_mb * 2**20 and window is None:
            parts = [self._read_alike(g) for g in range(len(self._groups.counts))]
            self._all = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
        else:
            self.layout = layout_of(self._groups.counts, window)
            self._groups.files.check_room(self.layout)
            # this window's and the next one's, each with a part of a group at both ends
            rows = min(len(self), 2 * self.layout.window + 4 * max(self._groups.counts))
            check_memory(path, rows, 4 * math.prod(self._shape), memory_bytes())
            self._decoded = DecodedGroups(self._read_alike, self._starts, rows)

    def _shaped(self, shape: list[int] | None, width: int) -> list[int]:
        if shape is not None and math.prod(shape) != width:
            raise DataError(f"data.shape={shape}: takes {math.prod(shape)} values, a row has {width}")
        return shape or [width]

    def _outputs(self, given: int | None) -> int:
        if self.targets_are == "values":
            return 1
        found = len(self.classes) or self._groups.highest(self._target) + 1
        if given is not None and given < found:
            raise DataError(
                f"{self.source}, column {self._target!r}: class {found - 1} is not below num_outputs={given}"
            )
        return given or found

    @property
    def digest(self) -> str:
        told = f"{self.features} {self._target} {self._shape} {self.targets_are} {self.classes}"
        return digest_of([], told, self._groups.digest)

    @property
    def in_memory(self) -> bool:
        """Whether a batch costs no reading."""
        return self._all is not None

    def tensors(self) -> Pair | None:
        """Everything, where it is in memory."""
        return self._all

    def decode(self, inputs: Tensor, targets: Tensor) -> Pair:
        """From stored to given, batch by batch; a bad row is refused here."""
        return inputs.view(len(inputs), *self._shape), targets

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Pair:
        inputs, targets = self.gather(np.array([index], dtype=np.int64))
        return inputs[0], targets[0]

    def expect(self, groups: Indices) -> None:
        """These row groups are needed soon: fetch their files and decode them in the background."""
        files = dict.fromkeys(self._groups.file_of[group] for group in groups.tolist())
        self._groups.files.expect(files)
        if self._all is None:
            self._decoded.expect(groups.tolist())

    def gather(self, indices: Indices) -> Pair:
        """Inputs [n, *input_shape] and targets; BadRecords names file, row group and row."""
        check_inside(indices, len(self))
        if self._all is not None:
            at = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
            inputs, targets = (part.index_select(0, at) for part in self._all)
        else:
            inputs, targets = self._decoded.gather(indices)
        refuse_not_finite(inputs, lambda row: self._where(int(indices[row])))
        refuse_not_finite(targets, lambda row: self._where(int(indices[row])))
        return self.decode(inputs, targets)

    def _where(self, sample: int) -> str:
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
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(f"{where}, row {row} (from 0): has no target: fill it or drop the row")
        if self.classes:
            numbers = {name: i for i, name in enumerate(self.classes)}
            return np.array([numbers[name] for name in column.to_pylist()], dtype=np.int64)
        values = column.to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero((values < 0) | (values != np.floor(values)))
        if len(wrong):
            raise DataError(f"{where}, row {wrong[0]} (from 0): {values[wrong[0]]} is not a class: they count from 0")
        return values.astype(np.int64)


def _floats(column: Any, where: str) -> npt.NDArray[np.float32]:
    """[rows, values a row]; an empty cell becomes NaN, and so a bad record."""
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
    return column.to_numpy(zero_copy_only=False).astype(np.float32)[:, None]
