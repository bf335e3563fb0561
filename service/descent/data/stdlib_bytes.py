"""A byte-level language model's text: the source files of Python's own standard library."""

import os
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from descent.data.base import Pair, TensorData, check_split
from descent.errors import DataError

_ADDED = {"site-packages", "dist-packages", "__pycache__"}  # not part of the standard library
_TESTS = {"test", "tests", "idle_test"}
_MACHINE = "_sysconfigdata"  # records how this one interpreter was built
_SEPARATOR = b"\0"  # never occurs in Python source: a model learns it as the end of a file


class StdlibBytes(TensorData):
    """Windows of `block` bytes of source code, and the same shifted by one as targets.

    Inputs and targets are int64 [n, block], values 0 … 255: target [i, t] is the byte after
    input [i, t]. Windows don't overlap (stride = block). The text is every *.py file in order
    of its relative path, a zero byte after each; every `evaluate_every`-th file belongs to
    'evaluate', the others to 'train', so evaluation text is unseen.

    include_tests: with the library's own tests, about 31 MB, else about 12 MB.
    max_bytes: use only the first so many bytes of the split's text; None for all.

    The files are those of the running interpreter: each Python version has its own digest.
    The text stays bytes in memory and becomes int64 batch by batch.
    """

    def __init__(
        self,
        block: int = 128,
        split: str = "train",
        evaluate_every: int = 10,
        include_tests: bool = False,
        max_bytes: int | None = None,
        path: str | None = None,
    ) -> None:
        check_split("stdlib", split)
        if block < 1:
            raise DataError(f"stdlib: block={block} must be at least 1 byte")
        if evaluate_every < 2:
            raise DataError(f"stdlib: evaluate_every={evaluate_every} leaves no file to train on: give 2 or more")
        folder = Path(path).expanduser() if path else Path(sysconfig.get_paths()["stdlib"])
        files = source_files(folder, include_tests)
        chosen = [
            file
            for number, file in enumerate(files)
            if split == "all" or (number % evaluate_every == evaluate_every - 1) == (split == "evaluate")
        ]
        text = _read(chosen, max_bytes)
        num_windows = (len(text) - 1) // block
        if num_windows < 1:
            raise DataError(
                f"stdlib: {len(text)} bytes of *.py under {folder} for split={split} (max_bytes="
                f"{max_bytes}) don't fill one window of block={block} bytes and its next byte"
            )
        # both are views on the one text: shifted by one byte, nothing is stored twice
        whole = num_windows * block
        super().__init__(
            text[:whole].view(num_windows, block),
            text[1 : whole + 1].view(num_windows, block),
            num_outputs=256,
            name="stdlib",
            source=str(folder),
        )

    def decode(self, inputs: Tensor, targets: Tensor) -> Pair:
        return inputs.long(), targets.long()


def source_files(folder: Path, include_tests: bool) -> list[Path]:
    """The library's *.py files, sorted by relative path, without what was installed into it."""
    left_out = _ADDED if include_tests else _ADDED | _TESTS
    found: list[tuple[str, Path]] = []
    # os.walk, since it can be told not to descend: site-packages may hold a million files
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out]
        for name in names:
            if name.endswith(".py") and not name.startswith(_MACHINE):
                file = Path(parent, name)
                found.append((file.relative_to(folder).as_posix(), file))
    if not found:
        raise DataError(
            f"no *.py files under {folder}: this Python ships its library without sources, "
            "choose another data set with data=NAME or a folder with data.path=FOLDER"
        )
    return [file for _, file in sorted(found)]


def _read(files: list[Path], max_bytes: int | None) -> Tensor:
    text = bytearray()
    for file in files:
        if max_bytes is not None and len(text) >= max_bytes:
            break
        try:
            text += file.read_bytes() + _SEPARATOR
        except OSError as error:
            raise DataError(f"{file} can't be read: {error}") from error
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8)[:max_bytes])
