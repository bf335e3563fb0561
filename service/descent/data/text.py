"""Text as bytes, without a tokenizer: one memory-mapped file, or the joined files of a folder."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from descent.data.base import LARGE, Pair, TensorData
from descent.data.regular_files import is_hidden, require_file
from descent.data.shards import local_file
from descent.errors import DataError

SEPARATOR = b"\0"  # after each file: the zero byte never occurs in text, so a model learns it as a file's end
MAX_JOINED = 1 << 30
"""Bytes of files that are joined in memory, at most."""


class Text(TensorData):
    """inputs int64 [n, block]: windows of the text's bytes, 0 … 255; targets int64 [n, block]: the next bytes.

    path: a text file (or s3://…), which is memory-mapped; or a folder, whose files that match
    `pattern` are joined in memory in the order of their names, a zero byte after each. Windows don't
    overlap. A folder above 1 GiB is refused: `descent data tokenize` turns it into shards, with any
    tokenizer.
    """

    def __init__(
        self, path: str | None = None, block: int = 128, pattern: str = "**/*.txt", name: str = "text"
    ) -> None:
        if path is None:
            raise DataError("data.path is not set: give a text file, or a folder of them")
        if block < 1:
            raise DataError(f"{name}: block={block} must be at least 1 byte")
        place = Path(path).expanduser()
        text = _joined(place, pattern) if place.is_dir() else _mapped(local_file(path), path)
        windows = (len(text) - 1) // block
        if windows < 1:
            raise DataError(f"{path}: {len(text)} bytes don't fill one window of block={block} bytes and its next byte")
        whole = windows * block
        super().__init__(
            text[:whole].view(windows, block),
            text[1 : whole + 1].view(windows, block),
            num_outputs=256,
            name=name,
            source=str(path),
            mapped=[local_file(path)] if len(text) > LARGE and not place.is_dir() else (),
        )

    def decode(self, inputs: Tensor, targets: Tensor) -> Pair:
        return inputs.long(), targets.long()


def text_files(folder: Path, pattern: str) -> list[Path]:
    """The folder's files that match, sorted by their relative path, without hidden ones. Raises DataError if none does."""
    try:
        found = [
            f for f in folder.glob(pattern) if f.is_file() and not any(map(is_hidden, f.relative_to(folder).parts))
        ]
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"data.pattern={pattern!r}: {error}; give one such as **/*.txt") from error
    if not found:
        raise DataError(f"{folder}: no file matches {pattern!r}; set data.pattern, such as **/*.md")
    return sorted(found, key=lambda f: f.relative_to(folder).as_posix())


def _joined(folder: Path, pattern: str) -> Tensor:
    files = text_files(folder, pattern)
    total = sum(file.stat().st_size for file in files)
    if total > MAX_JOINED:
        raise DataError(
            f"{folder}: {total} bytes in {len(files)} files are too many to join in memory; "
            f"run descent data tokenize {folder} OUT, and train with data=tokens data.path=OUT"
        )
    joined = bytearray()
    for file in files:
        try:
            joined += file.read_bytes() + SEPARATOR
        except OSError as error:
            raise DataError(f"{file} can't be read: {error}") from error
    return torch.from_numpy(np.frombuffer(joined, dtype=np.uint8))


def _mapped(file: Path, path: str) -> Tensor:
    require_file(file, "give a text file, or a folder of them")
    if file.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    # Torch wants a writeable array; with mode c a write would stay in memory.
    return torch.from_numpy(np.asarray(np.memmap(file, dtype=np.uint8, mode="c")))
