"""Turn text files into shards of token ids with an index: the work of `descent data tokenize`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from descent.data.regular_files import require_file
from descent.data.shards import INDEX, Shard, ShardIndex, shard_of, write_index
from descent.data.text import text_files
from descent.data.tokens import DTYPES
from descent.errors import DataError

Ids = npt.NDArray[np.unsignedinteger[Any]]
_PIECE = 1 << 20  # bytes of text read at a time, up to a line's end: a file may be larger than memory
_USUAL_SEPARATORS = ("<|endoftext|>", "</s>", "<eos>", "[SEP]")


class Tokenizer(Protocol):
    """Turns text into token ids from 0 to `vocabulary` - 1."""

    name: str
    vocabulary: int
    separator: int | None
    """The token after each file; None for no token."""

    def encode(self, text: bytes, where: str) -> Ids: ...


class Bytes:
    """Each byte is a token, and the zero byte separates files."""

    name = "bytes"
    vocabulary = 256
    separator: int | None = 0

    def encode(self, text: bytes, where: str) -> Ids:  # noqa: ARG002
        return np.frombuffer(text, dtype=np.uint8)


class HuggingFace:
    """A `tokenizer.json` of the Hugging Face library `tokenizers`.

    separator: the token after each file; by default the first usual one that the tokenizer knows.
    Raises DataError where the library is missing, the file is no tokenizer, or the token is unknown.
    """

    def __init__(self, file: Path, separator: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError as error:
            raise DataError(
                f'tokenizer {file}: needs the library tokenizers: pip install "descent-service[text]"'
            ) from error
        if not file.is_file():
            raise DataError(f"tokenizer {file} doesn't exist: give bytes, or a tokenizer.json")
        try:
            self._loaded = Loaded.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            reason = " ".join(str(error).split())
            raise DataError(f"tokenizer {file}: is not a tokenizer.json: {reason}") from error
        self.name = str(file)
        self.vocabulary: int = max(self._loaded.get_vocab(with_added_tokens=True).values()) + 1
        wanted = _USUAL_SEPARATORS if separator is None else (separator,)
        ids = [self._loaded.token_to_id(token) for token in wanted]
        self.separator: int | None = next((i for i in ids if i is not None), None)
        if separator is not None and self.separator is None:
            raise DataError(f"separator {separator!r}: tokenizer {file} knows no such token")

    def encode(self, text: bytes, where: str) -> Ids:
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: is not UTF-8 text: {error}") from error
        ids = self._loaded.encode(decoded, add_special_tokens=False).ids
        return np.array(ids, dtype=np.uint32)


def tokenizer_of(name: str, separator: str | None) -> Tokenizer:
    """The tokenizer that `name` stands for: `bytes`, or the path of a tokenizer.json."""
    if name == "bytes":
        if separator is not None:
            raise DataError("separator: the bytes tokenizer always separates files by a zero byte")
        return Bytes()
    return HuggingFace(Path(name).expanduser(), separator)


def tokenize(
    source: Path,
    target: Path,
    tokenizer: Tokenizer,
    *,
    pattern: str = "**/*.txt",
    shard_tokens: int = 1 << 25,
    progress: Callable[[int, int], None] | None = None,
) -> ShardIndex:
    """Write the token ids of a file, or of a folder's files in the order of their names, as shards.

    progress: called with (bytes read, bytes in all). The index is written last: a folder without an
    index holds no data set. Raises DataError for text that can't be read, and for a target folder
    that holds a data set already.
    """
    if shard_tokens < 2:
        raise DataError(f"shard-tokens={shard_tokens}: give 2 or more")
    if (target / INDEX).exists():
        raise DataError(f"{target}: holds a data set already ({INDEX}); choose another folder")
    if not source.is_dir():
        require_file(source, "give a text file, or a folder of them")
    files = text_files(source, pattern) if source.is_dir() else [source]
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{target}: can't be made: {error}") from error
    dtype = next(n for n, d in DTYPES.items() if tokenizer.vocabulary <= 1 << 8 * d.itemsize)
    writer = _Writer(target, DTYPES[dtype], shard_tokens)
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        for piece, offset in _pieces(file):
            writer.add(tokenizer.encode(piece, f"{file}, from byte {offset}"))
            done += len(piece)
            if progress is not None:
                progress(done, total)
        if tokenizer.separator is not None:
            writer.add(np.array([tokenizer.separator]))
    index = ShardIndex(
        "tokens",
        tuple(writer.finish()),
        {
            "dtype": dtype,
            "vocabulary": tokenizer.vocabulary,
            "tokenizer": tokenizer.name,
            "separator": tokenizer.separator,
            "files": len(files),
        },
    )
    write_index(target, index)
    return index


def _pieces(file: Path) -> Iterator[tuple[bytes, int]]:
    """The file in pieces that end at a line's end, each with the number of its first byte."""
    offset = 0
    try:
        with file.open("rb") as content:
            while piece := content.read(_PIECE):
                piece += content.readline()
                yield piece, offset
                offset += len(piece)
    except OSError as error:
        raise DataError(f"{file} can't be read: {error}") from error


class _Writer:
    """Writes shards of `shard_tokens` ids each; the last one may be smaller."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder, self._dtype, self._full = folder, dtype, shard_tokens
        self._shards: list[Shard] = []
        self._unwritten: list[Ids] = []
        self._count = 0

    def add(self, ids: npt.NDArray[Any]) -> None:
        while self._count + len(ids) >= self._full:
            room = self._full - self._count
            self._unwritten.append(ids[:room])
            self._write()
            ids = ids[room:]
        if len(ids):
            self._unwritten.append(ids)
            self._count += len(ids)

    def _write(self) -> None:
        name = f"shard-{len(self._shards):05d}.bin"
        ids = np.concatenate(self._unwritten).astype(self._dtype)
        file = self._folder / name
        try:
            ids.tofile(file)
        except OSError as error:
            raise DataError(f"{file}: can't be written: {error}") from error
        self._shards.append(shard_of(file, name, len(ids)))
        self._unwritten, self._count = [], 0

    def finish(self) -> list[Shard]:
        if self._count:
            self._write()
        if not self._shards:
            raise DataError(f"{self._folder}: the text is empty, there is nothing to write")
        return self._shards
