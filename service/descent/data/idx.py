"""Images and labels in IDX files, the format of MNIST, plain or gzipped.

An IDX file consists of two zero bytes, a type byte (8: unsigned bytes), the number of dimensions as a
byte, each dimension as a big-endian 32-bit number, and then the values in row-major order.
"""

import gzip
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from descent.data.bad_records import KnownBad, Policy
from descent.data.base import Pair, TensorData
from descent.data.preprocessing import NormalizePixels
from descent.data.row_cache import memory_bytes
from descent.data.splits import check_split
from descent.errors import DataError

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
"""The folder of Debian's package dataset-fashion-mnist."""

_PREFIX = {"train": "train", "evaluate": "t10k"}
_UNSIGNED_BYTE = 8
Content = gzip.GzipFile | io.BufferedReader
_MAX_DEFLATE_RATIO = 1032  # deflate can't compress better, so this bounds what a header may promise


class IdxFolder(TensorData):
    """Grey images and their classes, from a folder with the four files of an MNIST.

    The split 'train' reads `train-*`, 'evaluate' reads `t10k-*`. Inputs are float32
    [n, 1, rows, columns]: (pixel / 255 - mean) / std. Targets are int64 [n]. The images stay bytes in
    memory and become floats batch by batch: 60,000 images of 28×28 take 47 MB instead of 188.

    Raises DataError for a missing, malformed or truncated file (naming file and byte), for numbers of
    images and labels that differ, and for a label that is not below `num_outputs`; with on_error 'skip', such
    a sample is a bad record instead.
    """

    def __init__(
        self,
        path: str | None = FASHION_MNIST,
        split: str = "train",
        mean: float = 0.0,
        std: float = 1.0,
        num_outputs: int = 10,
        on_error: Policy = "fail",
        name: str = "idx",
    ) -> None:
        check_split(name, split, tuple(_PREFIX))
        if path is None:
            raise DataError("data.path is not set: give a folder of IDX files, data.path=FOLDER")
        if std <= 0:
            raise DataError(f"{name}: std={std} must be above 0")
        folder = Path(path).expanduser()
        images_file = _find(folder, f"{_PREFIX[split]}-images-idx3-ubyte")
        labels_file = _find(folder, f"{_PREFIX[split]}-labels-idx1-ubyte")
        images = read_idx(images_file, num_dims=3)
        labels = read_idx(labels_file, num_dims=1)
        if len(images) != len(labels):
            raise DataError(
                f"{images_file} holds {len(images)} images, {labels_file} holds {len(labels)} "
                "labels (bytes 4 to 7 of each): they must agree"
            )
        wrong = labels >= num_outputs

        def flaw(row: int) -> str:
            return f"{labels_file}: label {given[row]} of sample {row} (byte {8 + row}) is not below num_outputs={num_outputs}"

        given, labels = labels, np.where(wrong, 0, labels).astype(np.uint8)
        if wrong.any() and on_error == "fail":
            raise DataError(flaw(int(wrong.argmax())))
        super().__init__(
            torch.from_numpy(images).unsqueeze(1),
            torch.from_numpy(labels),
            num_outputs=num_outputs,
            name=name,
            source=str(folder),
            class_names=[str(label) for label in range(num_outputs)],
            preprocessing=NormalizePixels(mean, std),
            bad=KnownBad(wrong, flaw) if wrong.any() else None,
        )
        self.mean = mean
        self.std = std

    def decode(self, inputs: Tensor, targets: Tensor) -> Pair:
        pixels = inputs.float().div_(255.0).sub_(self.mean).div_(self.std)
        return pixels, targets.long()

    def decode_settings(self) -> str:
        return f"mean={self.mean} std={self.std}"


def _find(folder: Path, stem: str) -> Path:
    for candidate in (folder / stem, folder / f"{stem}.gz"):
        if candidate.is_file():
            return candidate
    missing = f"{folder / stem}.gz" if folder.is_dir() else f"folder {folder}"
    raise DataError(
        f"{missing} doesn't exist: apt-get install dataset-fashion-mnist, "
        "or name a folder of IDX files with data.path=FOLDER"
    )


def read_idx(file: Path, num_dims: int) -> npt.NDArray[np.uint8]:
    """The values of one IDX file of unsigned bytes, shaped as its header says.

    Raises DataError with the byte (of the unpacked content) at which the file goes wrong.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as content:
            shape = _read_header(file, content, num_dims)
            return _read_values(file, content, shape)
    except OSError as error:  # gzip.BadGzipFile is one
        raise DataError(f"{file} can't be read: {error}") from error


def _read_header(file: Path, content: Content, num_dims: int) -> tuple[int, ...]:
    length = 4 + 4 * num_dims
    header = np.zeros(length, dtype=np.uint8)
    got = _fill(content, header)
    raw = header.tobytes()
    if got >= 4 and raw[:4] != bytes((0, 0, _UNSIGNED_BYTE, num_dims)):
        raise DataError(
            f"{file}, byte 0: the magic number is 0x{raw[:4].hex()}, not "
            f"0x0000080{num_dims} (unsigned bytes in {num_dims} dimensions)"
        )
    if got < length:
        raise DataError(f"{file}, byte {got}: the file ends within its header of {length} bytes")
    shape: tuple[int, ...] = struct.unpack(f">{num_dims}I", raw[4:])
    return shape


def _read_values(file: Path, content: Content, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    start = 4 + 4 * len(shape)
    promised = int(np.prod(shape, dtype=object))
    # A broken header may promise terabytes: compare with the file's size before allocating memory.
    possible = (file.stat().st_size + 1) * (_MAX_DEFLATE_RATIO if file.suffix == ".gz" else 1)
    most = memory_bytes() // 2
    if most < promised <= possible:
        raise DataError(
            f"{file}: holds {promised / 1e9:.3g} GB ({' x '.join(map(str, shape))} values), more than half of the memory"
        )
    values = np.empty(promised if promised <= possible else min(possible, most), dtype=np.uint8)
    got = _fill(content, values)
    if got < promised:
        raise DataError(
            f"{file}, byte {start + got}: the file ends here, but its header promises "
            f"{start + promised} bytes ({' x '.join(map(str, shape))} values)"
        )
    try:
        rest = content.read(1)
    except (EOFError, zlib.error) as error:
        raise DataError(f"{file}, byte {start + got}: corrupt gzip data: {error}") from error
    if rest:
        raise DataError(
            f"{file}, byte {start + promised}: more bytes follow than the header's {' x '.join(map(str, shape))} values"
        )
    return values.reshape(shape)


def _fill(content: Content, buffer: npt.NDArray[np.uint8]) -> int:
    """Read until the buffer is full or the content ends, be it in the middle of gzip data; the bytes read."""
    view = buffer.data
    got = 0
    while got < len(view):
        try:
            count = content.readinto(view[got:])
        except (EOFError, zlib.error):
            break
        if not count:
            break
        got += count
    return got
