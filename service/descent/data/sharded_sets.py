"""Index, verify and copy sharded data sets: the work of `descent data index`, `inspect` and `copy`."""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from descent.data.files import data_errors, find_file, open_data
from descent.data.images import SUFFIXES
from descent.data.regular_files import is_hidden
from descent.data.shards import (
    INDEX,
    Shard,
    ShardIndex,
    parse_shard,
    read_index,
    sha256_of,
    shard_of,
    write_index,
)
from descent.data.tar_shards import index_tars
from descent.data.tokens import DTYPES
from descent.errors import DataError
from descent.storage import Store

Progress = Callable[[str, int, int], None]
"""Called with (the kind of work, bytes done, bytes in all)."""


def make_index(
    folder: Path, progress: Progress, *, dtype: str | None = None, vocabulary: int | None = None
) -> ShardIndex:
    """Read through a folder of *.tar, *.parquet or *.bin shards and write its index.json.

    dtype, vocabulary: of *.bin files, which hold bare token ids and say neither.
    Raises DataError when the folder holds no shards, or more than one kind of them.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give one with *.tar, *.parquet or *.bin files")
    kinds = {
        suffix: sorted(f for f in folder.glob(f"*{suffix}") if not is_hidden(f.name) and f.is_file())
        for suffix in (".tar", ".parquet", ".bin")
    }
    kinds[".bin"] = [file for file in kinds[".bin"] if file.name != "members.bin"]
    found = [suffix for suffix, files in kinds.items() if files]
    if len(found) != 1:
        there = " and ".join(f"*{suffix}" for suffix in found) or "no such files"
        raise DataError(f"{folder}: holds {there}; an index needs *.tar, *.parquet or *.bin, one of them")
    files = kinds[found[0]]
    if found[0] == ".tar":
        index = index_tars(folder, files, SUFFIXES, lambda done, total: progress("reading", done, total))
    elif found[0] == ".parquet":
        index = _parquet(files, progress)
    else:
        index = _tokens(files, progress, dtype, vocabulary)
    write_index(folder, index)
    return index


def _shards(files: list[Path], samples: list[int], progress: Progress) -> tuple[Shard, ...]:
    total, done, shards = sum(file.stat().st_size for file in files), 0, []
    for file, count in zip(files, samples, strict=True):
        shards.append(shard_of(file, file.name, count))
        done += file.stat().st_size
        progress("hashing", done, total)
    return tuple(shards)


def _parquet(files: list[Path], progress: Progress) -> ShardIndex:
    import pyarrow as pa
    import pyarrow.parquet as pq

    groups = []
    for file in files:
        try:
            metadata = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: is not a Parquet file: {' '.join(str(error).split())}") from error
        groups.append([metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)])
    shards = _shards(files, [sum(rows) for rows in groups], progress)
    return ShardIndex("parquet", shards, {"row_groups": groups})


def _tokens(files: list[Path], progress: Progress, dtype: str | None, vocabulary: int | None) -> ShardIndex:
    if dtype not in DTYPES or vocabulary is None:
        raise DataError(
            f"*.bin files don't say what they hold: give --dtype {'|'.join(DTYPES)} and --vocabulary NUMBER"
        )
    width = DTYPES[dtype].itemsize
    odd = next((file for file in files if file.stat().st_size % width), None)
    if odd is not None:
        raise DataError(f"{odd}: its {odd.stat().st_size} bytes are no whole number of {dtype}")
    counts = [file.stat().st_size // width for file in files]
    shards = _shards(files, counts, progress)
    return ShardIndex("tokens", shards, {"dtype": dtype, "vocabulary": vocabulary})


def _all_files(index: ShardIndex) -> list[Shard]:
    """The shards, and the other files that belong to the data set."""
    members: Any = index.about.get("members")
    return [*index.shards, *([parse_shard(members, f"{INDEX}, members")] if isinstance(members, dict) else [])]


def verify(store: Store, index: ShardIndex, progress: Progress) -> list[str]:
    """Read every file and compare it with the index; returns one line about each file that differs."""
    files = _all_files(index)
    total, done, wrong = sum(s.bytes for s in files), 0, []
    for shard in files:
        try:
            found = _digest(store, shard)
        except DataError as error:
            wrong.append(str(error))
        else:
            if found != shard.sha256:
                wrong.append(
                    f"{store.address}/{shard.file}: is corrupt: its SHA-256 is {found[:12]}…, not {shard.sha256[:12]}…"
                )
        done += shard.bytes
        progress("verifying", done, total)
    return wrong


_PIECE = 8 << 20


@data_errors()
def _digest(store: Store, shard: Shard) -> str:
    size = find_file(store, shard.file).size
    if size != shard.bytes:
        raise DataError(f"{store.address}/{shard.file}: has {size} bytes, the index says {shard.bytes}")
    content = hashlib.sha256()
    for start in range(0, size, _PIECE):
        content.update(store.get_range(shard.file, start, min(start + _PIECE, size)))
    return content.hexdigest()


@data_errors()
def copy(source: str, target: str, progress: Progress) -> tuple[ShardIndex, int]:
    """Copy a sharded data set between folders or s3:// addresses; (its index, number of files already at the target).

    Each file is verified while it is copied, and the index is written last: a target without an
    index holds no data set, and a copy that was interrupted goes on where it stopped.
    Raises DataError when a file isn't what the index says, or the target holds another data set.
    """
    origin, destination = open_data(source), open_data(target)
    index = read_index(origin)
    present = {entry.key for entry in destination.list()}
    if INDEX in present and destination.get(INDEX) != origin.get(INDEX):
        raise DataError(f"{target}: holds another data set ({INDEX}); choose another place")
    files = _all_files(index)
    total, done, kept = sum(s.bytes for s in files), 0, 0
    with tempfile.TemporaryDirectory(prefix="descent-") as scratch:
        for shard in files:
            if shard.file in present and _is_whole(destination, shard):
                kept += 1
            else:
                _copy_one(origin, destination, shard, Path(scratch) / "shard")
            done += shard.bytes
            progress("copying", done, total)
        destination.put(INDEX, origin.get(INDEX))
    return index, kept


def _is_whole(store: Store, shard: Shard) -> bool:
    return find_file(store, shard.file).size == shard.bytes and _digest(store, shard) == shard.sha256


def _copy_one(origin: Store, destination: Store, shard: Shard, scratch: Path) -> None:
    if origin.folder is not None:
        file = origin.folder / shard.file
        find_file(origin, shard.file)  # raises DataError where the file is missing
    else:
        file = scratch
        origin.download(shard.file, file)
    if (found := sha256_of(file)) != shard.sha256:
        raise DataError(
            f"{origin.address}/{shard.file}: is corrupt: its SHA-256 is {found[:12]}…, not {shard.sha256[:12]}…"
        )
    destination.upload(file, shard.file)
