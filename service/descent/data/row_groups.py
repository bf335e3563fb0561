"""The row groups of Parquet files, one or many, numbered through."""

import hashlib
from collections import OrderedDict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from descent.data.files import data_errors, find_file, is_remote, open_data
from descent.data.shards import INDEX, Shard, ShardFiles, ShardIndex, local_file, read_index
from descent.errors import DataError
from descent.storage import LocalStore, Store

_OPEN = 64  # files kept open
_FOOTER = 1 << 16


class RowGroups:
    """Reads row groups by number.

    counts: rows of each row group; file_of: the number of its file; schema: of the first file.
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
        if self.schema is not None and opened.schema_arrow.names != self.schema.names:
            raise DataError(
                f"{self._names[number]}: its columns are not those of {self._names[0]}: {opened.schema_arrow.names}"
            )
        self._open[number] = opened
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)
        return opened

    def columns(self, features: list[str] | None, target: str) -> list[str]:
        """The input columns. Raises DataError for names that aren't there."""
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
        """(file, row group within it)."""
        file = self.file_of[group]
        return self._names[file], group - self._first[file]

    def read(self, group: int, columns: list[str]) -> pa.Table:
        name, within = self.place(group)
        try:
            return self._file(self.file_of[group]).read_row_group(within, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{name}, row group {within}: can't be read: {_line(error)}") from error

    def distinct(self, column: str) -> list[str]:
        """The texts in a column, sorted."""
        found: set[str] = set()
        for group in range(len(self.counts)):
            values = self.read(group, [column]).column(column).unique().to_pylist()
            found.update(value for value in values if value is not None)
        return sorted(found)

    def highest(self, column: str) -> int:
        """The largest value of a column, from the files' statistics where they have them."""
        best = 0
        at = self.schema.names.index(column)
        for group in range(len(self.counts)):
            _, within = self.place(group)
            metadata = self._file(self.file_of[group]).metadata.row_group(within)
            told = metadata.column(at).statistics if metadata.num_columns == len(self.schema.names) else None
            if told is not None and told.has_min_max:
                best = max(best, int(told.max))
            else:
                values = self.read(group, [column]).column(column).to_numpy()
                best = max(best, int(values.max(initial=0)))
        return best


def _files_of(path: str) -> tuple[ShardFiles, list[str]]:
    """The files as shards, and their names for messages."""
    single = path.endswith((".parquet", ".pq"))
    if single:
        file = local_file(path)
        if not file.is_file():
            raise DataError(f"{path} doesn't exist: give data.path=FILE.parquet, or a folder")
        store: Store = LocalStore(file.parent)
        index = index_of(store, [file.name])
        return ShardFiles(store, index), [path]
    store = open_data(path)
    if is_remote(path) or (store.folder is not None and (store.folder / INDEX).is_file()):
        index = read_index(store, "parquet")
    else:
        folder = Path(path).expanduser()
        found = sorted(p.name for p in (*folder.glob("*.parquet"), *folder.glob("*.pq")))
        if not found:
            raise DataError(f"{path}: no *.parquet file there: give data.path=FILE.parquet, or a folder of them")
        index = index_of(store, found)
    return ShardFiles(store, index), [f"{path}/{shard.file}" for shard in index.shards]


@data_errors()
def index_of(store: Store, names: list[str]) -> ShardIndex:
    """An index made on the spot: by size and footer (it has each column's place and range), not by all bytes."""
    shards = []
    for name in names:
        size = find_file(store, name).size
        footer = store.get_range(name, max(0, size - _FOOTER), size)
        tag = hashlib.sha256(f"{name} {size} ".encode() + footer).hexdigest()
        shards.append(Shard(name, size, tag, 0))
    return ShardIndex("parquet", tuple(shards), {})


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
