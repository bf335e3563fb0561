"""Your own table: a CSV file with a header, numeric columns and one target column."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from descent.data.base import TensorData, rows_of, standardized
from descent.data.shards import local_file, size_of
from descent.errors import DataError


class Csv(TensorData):
    """inputs float32 [n, columns]; targets int64 [n] (classes) or float32 [n, 1] (values).

    features: names of the input columns; null for all but the target.
    targets_are: 'classes' or 'values'; null decides: whole numbers or text are classes, numbers
    of which one has a fraction are values. Classes are numbered in sorted order over the whole
    file and kept, as written, in `classes`.
    standardize: the features, by mean and standard deviation of the training split that
    (holdout, seed) defines, whichever split is asked for.
    max_mb: a larger file is refused before it is fetched or read: it is read whole, and while it
    is, its cells take about ten times its size in memory.

    Raises DataError naming the file, the row as an editor counts it (the header is row 1), the
    column and the value.
    """

    def __init__(
        self,
        path: str | None = None,
        target: str | None = None,
        features: list[str] | None = None,
        delimiter: str = ",",
        standardize: bool = True,
        targets_are: str | None = None,
        split: str = "all",
        holdout: float = 0.1,
        seed: int = 0,
        max_mb: float = 512.0,
        name: str = "csv",
    ) -> None:
        if path is None:
            raise DataError("data.path is not set: give data.path=FILE.csv")
        if target is None:
            raise DataError("data.target is not set: give the column to predict, data.target=NAME")
        if targets_are not in (None, "classes", "values"):
            raise DataError(f"data.targets_are={targets_are!r} is neither classes nor values")
        if len(delimiter) != 1:
            raise DataError(f"data.delimiter={delimiter!r} must be one character")
        size = size_of(path)
        if size > max_mb * 2**20:
            raise DataError(
                f"{path}: {size / 2**20:,.0f} MB are more than data.max_mb={max_mb:g}, and reading a CSV "
                "takes ten times its size in memory: write it as Parquet, which is read by row groups "
                "(data=parquet), or raise data.max_mb"
            )
        table = _Table(local_file(path), delimiter)
        if features is not None and not features:
            raise DataError("data.features is empty: name at least one column, or null for all")
        if features is not None and target in features:
            raise DataError(f"data.features holds {target!r}, which is data.target")
        chosen = list(features) if features is not None else [n for n in table.header if n != target]
        if not chosen:
            raise DataError(f"{path}: no column is left beside the target {target!r}")
        table.columns([*chosen, target])  # unknown names are refused before any cell is
        columns = [table.numbers(column) for column in chosen]
        inputs = np.stack(columns, axis=1)
        targets, self.classes = _targets(table, target, targets_are)
        if standardize:
            train = rows_of(len(inputs), "train", holdout, seed)
            inputs = standardized(inputs, train)[0]
        self.features = chosen
        rows = rows_of(len(inputs), split, holdout, seed)
        super().__init__(
            torch.from_numpy(inputs[rows]).float(),
            torch.from_numpy(targets[rows]),
            num_outputs=len(self.classes) if self.classes else 1,
            name=name,
            source=str(path),
        )


class _Table:
    """The cells of a file as text, each row with its number in an editor."""

    def __init__(self, file: Path, delimiter: str) -> None:
        self.file = file
        self.header: list[str] = []
        self.rows: list[list[str]] = []
        self.row_numbers: list[int] = []
        if not file.is_file():
            raise DataError(f"{file} doesn't exist: give data.path=FILE.csv")
        for number, cells in self._lines(delimiter):
            if not self.header:
                self.header = [cell.strip() for cell in cells]
                continue
            if len(cells) != len(self.header):
                raise DataError(f"{file}, row {number}: {len(cells)} columns, but the header has {len(self.header)}")
            self.rows.append(cells)
            self.row_numbers.append(number)
        if not self.rows:
            raise DataError(f"{file}: no rows below the header")
        twice = [name for name in self.header if self.header.count(name) > 1]
        if twice:
            raise DataError(f"{file}, row 1: the column name {twice[0]!r} occurs more than once")

    def _lines(self, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        number = 1
        try:
            # utf-8-sig: spreadsheets put a byte order mark before the first column's name
            with self.file.open(encoding="utf-8-sig", newline="") as lines:
                reader = csv.reader(lines, delimiter=delimiter, strict=True)
                for cells in reader:
                    if cells:
                        yield number, cells
                    number = reader.line_num + 1  # a quoted cell may span lines
        except UnicodeDecodeError as error:
            raise DataError(f"{self.file} is not UTF-8 text: {error}") from error
        except csv.Error as error:
            raise DataError(f"{self.file}, row {number}: {error}") from error
        except OSError as error:
            raise DataError(f"{self.file} can't be read: {error}") from error

    def columns(self, names: list[str]) -> list[int]:
        for name in names:
            if name not in self.header:
                raise DataError(
                    f"{self.file}, row 1: no column {name!r}; there are "
                    f"{', '.join(self.header)} (is data.delimiter right?)"
                )
        return [self.header.index(name) for name in names]

    def text(self, name: str) -> list[str]:
        (at,) = self.columns([name])
        return [cells[at].strip() for cells in self.rows]

    def numbers(self, name: str) -> npt.NDArray[np.float64]:
        """One column as float64 [rows]; DataError for a cell that isn't a finite number."""
        values = np.empty(len(self.rows))
        for i, cell in enumerate(self.text(name)):
            number = _number(cell)
            if number is None or not math.isfinite(number):
                raise self.refusal(i, name, cell, "is not a finite number")
            values[i] = number
        return values

    def refusal(self, i: int, name: str, cell: str, why: str) -> DataError:
        value = f"value {cell!r}" if cell else "empty cell"
        return DataError(f"{self.file}, row {self.row_numbers[i]}, column {name!r}: {value} {why}")


def _number(cell: str) -> float | None:
    try:
        # Python would also read 1_000 as a thousand; in a table that is a slip
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _targets(
    table: _Table, column: str, targets_are: str | None
) -> tuple[npt.NDArray[np.int64] | npt.NDArray[np.float32], list[str]]:
    """(class numbers [n], class names) or (values [n, 1], [])."""
    cells = table.text(column)
    for i, cell in enumerate(cells):
        if not cell:
            raise table.refusal(i, column, cell, "has no target: fill it or drop the row")
    numbers = [_number(cell) for cell in cells]
    if targets_are is None:
        is_number = [number is not None for number in numbers]
        if any(is_number) and not all(is_number):
            rarer = 2 * sum(is_number) <= len(cells)  # the rarer kind is the likelier slip
            odd = is_number.index(rarer)
            others = "text" if rarer else "numbers"
            why = f"is unlike most others ({others}): mend it, or set data.targets_are=classes"
            raise table.refusal(odd, column, cells[odd], why)
        fractions = any(number is not None and number % 1 != 0 for number in numbers)
        targets_are = "values" if fractions else "classes"
    if targets_are == "values":
        return table.numbers(column).astype(np.float32)[:, None], []
    # numbers in numeric order (2 before 10), and 1 and 1.0 are the same class
    if all(number is not None and math.isfinite(number) for number in numbers):
        keys, at = np.unique(np.array(numbers, dtype=np.float64), return_inverse=True)
        return at.astype(np.int64), [f"{key:.15g}" for key in keys]
    names = sorted(set(cells))
    number_of = {name: i for i, name in enumerate(names)}
    return np.array([number_of[cell] for cell in cells], dtype=np.int64), names
