"""Text for a byte-level language model: the source files of Python's own standard library."""

import os
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from descent.data.base import Pair, TensorData
from descent.data.splits import check_split
from descent.data.text import MAX_JOINED
from descent.errors import DataError

_INSTALLED = {"site-packages", "dist-packages", "__pycache__"}  # not part of the standard library
_TESTS = {"test", "tests", "idle_test"}
_BUILD_RECORD = "_sysconfigdata"  # describes how one interpreter was built, so it differs between machines
_SEPARATOR = b"\0"  # never occurs in Python source, so a model learns it as a file's end


class StdlibBytes(TensorData):
    """inputs int64 [n, block]: windows of source code's bytes, 0 … 255; targets int64 [n, block]: the next bytes.

    Windows don't overlap. The text is every *.py file in the order of the relative paths, a zero byte
    after each. Every `evaluate_every`-th file belongs to the split 'evaluate', the others to 'train',
    so that training never sees the text of the evaluation.

    include_tests: whether the library's own tests belong to the text: about 31 MB with them, 12 MB without.
    max_bytes: the first bytes of the split's text that are used; None for all.

    The files are those of the running interpreter, so each Python version has its own digest. The text
    stays bytes in memory and becomes int64 batch by batch.
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
        # Both tensors are views on the one text, shifted by one byte: nothing is stored twice.
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
    """The library's *.py files, sorted by relative path, without the packages that were installed into it."""
    left_out = _INSTALLED if include_tests else _INSTALLED | _TESTS
    found: list[tuple[str, Path]] = []
    # os.walk can leave folders out: site-packages may hold a million files.
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out]
        for name in names:
            if name.endswith(".py") and not name.startswith(_BUILD_RECORD):
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
        if len(text) + file.stat().st_size > MAX_JOINED:
            raise DataError(f"{file}: the text is longer than {MAX_JOINED / 1e9:.3g} GB by now: set data.max_bytes")
        try:
            text += file.read_bytes() + _SEPARATOR
        except OSError as error:
            raise DataError(f"{file} can't be read: {error}") from error
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8)[:max_bytes])
