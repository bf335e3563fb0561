"""Your own table: a CSV file with a header, columns of numbers and of text, and one target column."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from descent.data.bad_records import FLOAT32_MAX, KnownBad, Policy
from descent.data.regular_files import require_file
from descent.data.shards import local_file, size_of
from descent.data.splits import rows_of
from descent.data.table_columns import Columns, TableData, scale_of
from descent.errors import DataError

_MOST_CATEGORIES = 100  # of a column that nobody named as categories


class Csv(TableData):
    """inputs float32 [n, width]; targets int64 [n] (classes) or float32 [n, 1] (values).

    A column of numbers is one column of the inputs. A column of categories is one column for each text that it has in
    the training rows: 1 where the row has this text, else 0 (one-hot). A text that no training row has gives zeros.

    features: names of the input columns; null for all columns but the target and those in `drop`.
    drop: names of columns that are left out.
    categories: names of columns that are taken as categories, whatever they hold (postcodes, months). A column in
    which no cell is a number is taken so anyway.
    delimiter: one character; '\\t' stands for a tab.
    target_scale: whether a model that takes `target_scale` is told mean and deviation of the values to predict, which are
    left as they are.
    targets_are: 'classes' or 'values'; null decides: whole numbers or text are classes, numbers of which
    one has a fraction are values. Classes are numbered in sorted order over the whole file;
    `class_names` has them as they are written there.
    standardize: true, false, or the names of the columns that are standardized: true is all columns of numbers. Mean and
    standard deviation, and the categories, are those of the training split that (holdout, seed) defines, whichever
    split is asked for; where a run splits the data otherwise, those of its training rows.
    max_mb: a larger file is refused before it is fetched or read. The file is read whole, and meanwhile
    its cells take about ten times its size in memory.
    on_error: with 'skip', a row with a cell that can't be used is a bad record; with 'fail', the file is
    refused.

    Raises DataError naming the file, the row as an editor counts it (the header is row 1), the column
    and the value.
    """

    def __init__(
        self,
        path: str | None = None,
        target: str | None = None,
        features: list[str] | None = None,
        delimiter: str = ",",
        standardize: bool | list[str] = True,
        targets_are: str | None = None,
        split: str = "all",
        holdout: float = 0.1,
        seed: int = 0,
        max_mb: float = 512.0,
        on_error: Policy = "fail",
        name: str = "csv",
        drop: list[str] | None = None,
        categories: list[str] | None = None,
        target_scale: bool | None = False,
    ) -> None:
        features, drop, categories = _names(features), _names(drop), _names(categories)
        standardize = standardize if isinstance(standardize, bool) else _names(standardize) or False
        _check_arguments(path, target, features, drop, targets_are)
        assert path is not None and target is not None
        delimiter = "\t" if delimiter == "\\t" else delimiter
        if len(delimiter) != 1:
            raise DataError(f"data.delimiter={delimiter!r} must be one character")
        size = size_of(path)
        if size > max_mb * 2**20:
            raise DataError(
                f"{path}: {size / 2**20:,.0f} MB are more than data.max_mb={max_mb:g}, and reading a CSV "
                "takes ten times its size in memory: write it as Parquet, which is read by row groups "
                "(data=parquet), or raise data.max_mb"
            )
        table = _Table(local_file(path), delimiter, on_error)
        left_out = {target, *(drop or ())}
        chosen = list(features) if features is not None else [n for n in table.header if n not in left_out]
        table.columns([*chosen, target, *(drop or ())])  # refuses unknown names before any cell is looked at
        if not chosen:
            raise DataError(f"{path}: no column is left beside the target {target!r}")
        for key, named in (("categories", categories), ("standardize", standardize)):
            for column in named if isinstance(named, list) else ():
                if column not in chosen:
                    raise DataError(
                        f"data.{key} names {column!r}, which is no input column; there are {', '.join(chosen)}"
                    )
        columns = _columns(table, chosen, standardize, categories or [], str(path))
        targets, class_names = _targets(table, target, targets_are)
        bad = table.known_bad()
        train = rows_of(len(targets), "train", holdout, seed)
        usable = train[~table.is_bad[train]]
        scaled = bool(target_scale) and not class_names
        rows = rows_of(len(targets), split, holdout, seed)
        self.features = chosen
        super().__init__(
            columns.of(rows),
            torch.from_numpy(targets[rows]),
            columns.learn(usable),
            num_outputs=len(class_names) if class_names else 1,
            name=name,
            source=str(path),
            class_names=class_names,
            bad=None if bad is None else bad.of(rows),
            target_scale=scale_of(targets[usable].astype(np.float32)) if scaled and len(usable) else None,
        )

    def decode_settings(self) -> str:
        return f"features={self.features} classes={list(self.class_names or ())}"


def _names(given: list[str] | str | None) -> list[str] | None:
    """A list of column names; one name may be given without brackets."""
    return None if given is None else [given] if isinstance(given, str) else [str(name) for name in given]


def _check_arguments(
    path: str | None, target: str | None, features: list[str] | None, drop: list[str] | None, targets_are: str | None
) -> None:
    if path is None:
        raise DataError("data.path is not set: give data.path=FILE.csv")
    if target is None:
        raise DataError("data.target is not set: give the column to predict, data.target=NAME")
    if targets_are not in (None, "classes", "values"):
        raise DataError(f"data.targets_are={targets_are!r} is neither classes nor values")
    if features is not None and not features:
        raise DataError("data.features is empty: name at least one column, or null for all")
    if features is not None and target in features:
        raise DataError(f"data.features holds {target!r}, which is data.target")
    if features is not None and drop:
        raise DataError("data.features and data.drop are both set: name the columns to take, or those to leave out")
    if drop and target in drop:
        raise DataError(f"data.drop holds {target!r}, which is data.target")


def _columns(
    table: "_Table", chosen: list[str], standardize: bool | list[str], categories: list[str], source: str
) -> Columns:
    """The input columns: each is one of numbers or one of categories. Raises DataError for cells that can't be used."""
    values, texts, standardized = [], {}, set()
    for name in chosen:
        if name in categories or table.is_text(name):
            numbers, texts[name] = table.categories(name)
            if name not in categories and len(texts[name]) > _MOST_CATEGORIES:
                raise DataError(
                    f"{source}, column {name!r}: {len(texts[name]):,} different texts: leave it out (data.drop=[{name}]), "
                    f"or take each as a category (data.categories=[{name}])"
                )
            if isinstance(standardize, list) and name in standardize:
                raise DataError(
                    f"data.standardize names {name!r}, which holds categories: name columns of numbers only"
                )
        else:
            scaled = name in standardize if isinstance(standardize, list) else standardize
            standardized.update([name] if scaled else [])
            numbers = table.numbers(name, math.inf if scaled else FLOAT32_MAX)
        values.append(numbers)
    return Columns(tuple(chosen), np.stack(values, axis=1), texts, frozenset(standardized), source)


class _Table:
    """The cells of a file as text, each row with its number in an editor, and the rows that can't be used."""

    def __init__(self, file: Path, delimiter: str, on_error: Policy) -> None:
        self.file, self._on_error = file, on_error
        self.header: list[str] = []
        self.rows: list[list[str]] = []
        self.row_numbers: list[int] = []
        self._flaws: dict[int, str] = {}
        require_file(file, "give data.path=FILE.csv")
        for number, cells in self._lines(delimiter):
            if not self.header:
                self.header = [cell.strip() for cell in cells]
                continue
            self.rows.append(cells)
            self.row_numbers.append(number)
            if len(cells) != len(self.header):
                why = f"{file}, row {number}: {len(cells)} columns, but the header has {len(self.header)}"
                self._note(len(self.rows) - 1, why)
                self.rows[-1] = [""] * len(self.header)
        if not self.rows:
            raise DataError(f"{file}: no rows below the header")
        twice = [name for name in self.header if self.header.count(name) > 1]
        if twice:
            raise DataError(f"{file}, row 1: the column name {twice[0]!r} occurs more than once")

    def _lines(self, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        number = 1
        try:
            # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
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

    @property
    def is_bad(self) -> npt.NDArray[np.bool_]:
        """[rows], which of the rows can't be used."""
        bad = np.zeros(len(self.rows), dtype=bool)
        bad[list(self._flaws)] = True
        return bad

    def known_bad(self) -> KnownBad | None:
        return KnownBad(self.is_bad, lambda i: self._flaws[i]) if self._flaws else None

    def columns(self, names: list[str]) -> list[int]:
        """The places of the columns. Raises DataError for a name that the header doesn't have."""
        for name in names:
            if name not in self.header:
                raise DataError(
                    f"{self.file}, row 1: no column {name!r}; there are "
                    f"{', '.join(self.header)} (is data.delimiter right?)"
                )
        return [self.header.index(name) for name in names]

    def text(self, name: str) -> list[str]:
        """The cells of one column."""
        (at,) = self.columns([name])
        return [cells[at].strip() for cells in self.rows]

    def is_text(self, name: str) -> bool:
        """Whether the column has text in it, and no number."""
        filled = [cell for cell in self.text(name) if cell]
        return bool(filled) and all(_number(cell) is None for cell in filled)

    def categories(self, name: str) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
        """(the number of each row's text [rows], NaN for an empty cell; the texts in sorted order)."""
        cells = self.text(name)
        texts = sorted({cell for cell in cells if cell})
        number_of = {text: number for number, text in enumerate(texts)}
        for i, cell in enumerate(cells):
            if not cell:
                self.refuse(i, name, cell, "is no category: fill it (none, unknown) or drop the row")
        return np.array([number_of.get(cell, math.nan) for cell in cells], dtype=np.float64), tuple(texts)

    def numbers(self, name: str, most: float) -> npt.NDArray[np.float64]:
        """One column as float64 [rows]; a cell that isn't a finite number of at most `most` is refused."""
        values = np.full(len(self.rows), np.nan)
        for i, cell in enumerate(self.text(name)):
            number = _number(cell)
            if number is None or not math.isfinite(number):
                self.refuse(i, name, cell, "is not a finite number")
            elif abs(number) > most:
                self.refuse(i, name, cell, f"is beyond float32 ({FLOAT32_MAX:.3g})")
            else:
                values[i] = number
        return values

    def refuse(self, i: int, name: str, cell: str, why: str) -> None:
        """Raise DataError about a cell, or note its row as a bad record where those are skipped."""
        value = f"value {cell!r}" if cell else "empty cell"
        self._note(i, f"{self.file}, row {self.row_numbers[i]}, column {name!r}: {value} {why}")

    def _note(self, i: int, message: str) -> None:
        if self._on_error == "fail":
            raise DataError(message)
        self._flaws.setdefault(i, message)


def _number(cell: str) -> float | None:
    try:
        # Python would read 1_000 as a thousand; in a table that is a slip.
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _targets(
    table: _Table, column: str, targets_are: str | None
) -> tuple[npt.NDArray[np.int64] | npt.NDArray[np.float32], list[str]]:
    """(class numbers [n], class names) or (values [n, 1], []); unusable rows have the class 0 or NaN."""
    cells = table.text(column)
    for i, cell in enumerate(cells):
        if not cell:
            table.refuse(i, column, cell, "has no target: fill it or drop the row")
    usable = [i for i, cell in enumerate(cells) if cell]
    numbers = {i: _number(cells[i]) for i in usable}
    if targets_are is None:
        is_number = {i: number is not None for i, number in numbers.items()}
        if len(set(is_number.values())) > 1:
            rarer = 2 * sum(is_number.values()) <= len(usable)  # the rarer kind is the likelier slip
            others = "text" if rarer else "numbers"
            for odd in [i for i in usable if is_number[i] == rarer]:
                why = f"is unlike most others ({others}): mend it, or set data.targets_are=classes"
                table.refuse(odd, column, cells[odd], why)
            usable = [i for i in usable if is_number[i] != rarer]
        fractions = any(number % 1 != 0 for i in usable if (number := numbers[i]) is not None)
        targets_are = "values" if fractions else "classes"
    if targets_are == "values":
        return table.numbers(column, FLOAT32_MAX).astype(np.float32)[:, None], []
    targets = np.zeros(len(cells), dtype=np.int64)
    known = [number for i in usable if (number := numbers[i]) is not None and math.isfinite(number)]
    if len(known) == len(usable):
        # Numbers in numeric order (2 before 10); 1 and 1.0 are the same class.
        keys, at = np.unique(np.array(known, dtype=np.float64), return_inverse=True)
        targets[usable] = at
        return targets, [f"{key:.15g}" for key in keys]
    names = sorted({cells[i] for i in usable})
    number_of = {name: number for number, name in enumerate(names)}
    targets[usable] = [number_of[cells[i]] for i in usable]
    return targets, names
