"""The row groups of one or many Parquet files, numbered through all files."""

import hashlib
from collections import OrderedDict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from descent.data.files import data_errors, find_file, is_remote, open_data
from descent.data.regular_files import is_hidden, require_file
from descent.data.shards import INDEX, Shard, ShardFiles, ShardIndex, local_file, read_index
from descent.errors import DataError
from descent.storage import LocalStore, Store

_OPEN = 64  # files that stay open
_FOOTER = 1 << 16  # bytes at a file's end that its digest covers


class RowGroups:
    """Reads row groups by number.

    counts: the rows of each row group. file_of: the number of each row group's file. schema: of the first file.
    """

    def __init__(self, path: str) -> None:
        self.files, names = _files_of(path)
        self._path = path
        self.counts: list[int] = []
        self.file_of: list[int] = []
        self._first: list[int] = []
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._names = names
        self.schema: pa.Schema = None
        self.schema = self._file(0).schema_arrow
        groups = self.files.index.about.get("row_groups")
        if isinstance(groups, list) and len(groups) == len(names):
            counts = groups
        else:
            counts = [self._counts(number) for number in range(len(names))]
        for number, rows in enumerate(counts):
            self._first.append(len(self.counts))
            self.counts += rows
            self.file_of += [number] * len(rows)

    @property
    def digest(self) -> str:
        return self.files.index.digest

    def _counts(self, number: int) -> list[int]:
        metadata = self._file(number).metadata
        return [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]

    def _file(self, number: int) -> pq.ParquetFile:
        if number in self._open:
            return self._open[number]
        file = self.files.path(number)
        try:
            opened = pq.ParquetFile(file, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._names[number]} is not a Parquet file: {_line(error)}") from error
        if self.schema is not None:
            self._check_schema(self._names[number], opened.schema_arrow)
        self._open[number] = opened
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)
        return opened

    def _check_schema(self, name: str, schema: pa.Schema) -> None:
        """Raise DataError unless the columns are those of the first file, with values of the same kind."""
        if schema.names != self.schema.names:
            raise DataError(f"{name}: its columns are not those of {self._names[0]}: {schema.names}")
        for first, other in zip(self.schema, schema, strict=True):
            if _kind(first.type) != _kind(other.type):
                raise DataError(
                    f"{name}, column {first.name!r}: is of type {other.type}, in {self._names[0]} it is of type "
                    f"{first.type}: write it with one type in all files"
                )

    def columns(self, features: list[str] | None, target: str) -> list[str]:
        """The input columns. Raises DataError for names that the files don't have."""
        names: list[str] = list(self.schema.names)
        for name in [*(features or []), target]:
            if name not in names:
                raise DataError(f"{self._path}: no column {name!r}; there are {', '.join(names)}")
        if features is not None and target in features:
            raise DataError(f"data.features holds {target!r}, which is data.target")
        chosen = [n for n in names if n != target] if features is None else list(features)
        if not chosen:
            raise DataError(f"{self._path}: no column is left beside the target {target!r}")
        return chosen

    def place(self, group: int) -> tuple[str, int]:
        """(name of the file, number of the row group within the file)."""
        file = self.file_of[group]
        return self._names[file], group - self._first[file]

    def read(self, group: int, columns: list[str]) -> pa.Table:
        name, within = self.place(group)
        try:
            return self._file(self.file_of[group]).read_row_group(within, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{name}, row group {within}: can't be read: {_line(error)}") from error

    def distinct(self, column: str) -> list[str]:
        """The distinct texts of a column, sorted."""
        found: set[str] = set()
        for group in range(len(self.counts)):
            values = self.read(group, [column]).column(column).unique().to_pylist()
            found.update(value for value in values if value is not None)
        return sorted(found)

    def highest(self, column: str) -> int:
        """The largest value of a column of numbers, from the files' statistics where they exist; at least 0."""
        best = 0
        at = self.schema.names.index(column)
        for group in range(len(self.counts)):
            _, within = self.place(group)
            metadata = self._file(self.file_of[group]).metadata.row_group(within)
            statistics = metadata.column(at).statistics if metadata.num_columns == len(self.schema.names) else None
            if statistics is not None and statistics.has_min_max:
                best = max(best, int(statistics.max))
            else:
                values = self.read(group, [column]).column(column).to_numpy()
                best = max(best, int(values.max(initial=0)))
        return best


def _files_of(path: str) -> tuple[ShardFiles, list[str]]:
    """The files as shards, and their names for messages."""
    single = path.endswith((".parquet", ".pq"))
    if single:
        file = local_file(path)
        require_file(file, "give data.path=FILE.parquet, or a folder")
        store: Store = LocalStore(file.parent)
        return ShardFiles(store, index_of(store, [file.name])), [path]
    store = open_data(path)
    if is_remote(path) or (store.folder is not None and (store.folder / INDEX).is_file()):
        index = read_index(store, "parquet")
    else:
        folder = Path(path).expanduser()
        listed = (*folder.glob("*.parquet"), *folder.glob("*.pq"))
        found = sorted(p.name for p in listed if not is_hidden(p.name))
        for name in found:
            require_file(folder / name, "take it out of the folder")
        if not found:
            raise DataError(f"{path}: no *.parquet file there: give data.path=FILE.parquet, or a folder of them")
        index = index_of(store, found)
    return ShardFiles(store, index), [f"{path}/{shard.file}" for shard in index.shards]


@data_errors()
def index_of(store: Store, names: list[str]) -> ShardIndex:
    """An index of files that have none.

    The tag of a file covers its size and its footer, which holds each column's place and range, and not
    all bytes.
    """
    shards = []
    for name in names:
        size = find_file(store, name).size
        footer = store.get_range(name, max(0, size - _FOOTER), size)
        tag = hashlib.sha256(f"{name} {size} ".encode() + footer).hexdigest()
        shards.append(Shard(name, size, tag, 0))
    return ShardIndex("parquet", tuple(shards), {})


def _kind(kind: pa.DataType) -> str:
    """What is read alike has the same kind: numbers of any width, texts, lists of one kind."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return "number"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"list of {_kind(kind.value_type)}"
    return str(kind)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
