"""Your own arrays: two .npy files, or one .npz."""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from descent.data.base import LARGE, Indices, Pair, TensorData
from descent.data.records import refuse_not_finite
from descent.data.shards import local_file
from descent.errors import DataError

Array = npt.NDArray[Any]
_CHUNK_BYTES = 16 << 20  # checks go piecewise, so that a memory-mapped file stays on disk


class Arrays(TensorData):
    """inputs [num_samples, *input_shape] and targets [num_samples] or [num_samples, values].

    Give `path`, a .npz holding both, or `inputs` and `targets`, two .npy files, here or on
    s3://. They are memory-mapped, so that they may be larger than memory (a .npz that was
    written compressed is read whole). Nothing is ever unpickled.

    Inputs: floats become float32. Integers stay integers (int64: tokens), unless `scale` is
    given: then they become float32 times `scale` (images: 1/255 = 0.00392156862745098).
    Targets: integers are class numbers (int64), floats are values to regress (float32, at least
    one column: [n, 1]). `targets_are` says 'classes' or 'values' where the type doesn't.
    num_outputs: by default the highest class + 1, or the number of values in a target.

    Raises DataError naming file, array and row.
    """

    def __init__(
        self,
        path: str | None = None,
        inputs: str | None = None,
        targets: str | None = None,
        inputs_key: str = "inputs",
        targets_key: str = "targets",
        targets_are: str | None = None,
        num_outputs: int | None = None,
        scale: float | None = None,
        name: str = "arrays",
    ) -> None:
        if targets_are not in (None, "classes", "values"):
            raise DataError(f"{name}: targets_are={targets_are!r} is neither classes nor values")
        if path is not None and (inputs or targets):
            raise DataError(f"{name}: give either path (.npz) or inputs and targets (.npy)")
        if path is not None:
            x, y = _load_npz(local_file(path), (inputs_key, targets_key), path)
            x_name, y_name = f"{path} [{inputs_key}]", f"{path} [{targets_key}]"
        elif inputs is not None and targets is not None:
            x, y = _load_npy(local_file(inputs)), _load_npy(local_file(targets))
            x_name, y_name = inputs, targets
        else:
            raise DataError(
                "data.path is not set: give data.path=FILE.npz, or both data.inputs=FILE.npy and data.targets=FILE.npy"
            )
        x, y = _numeric(x, x_name), _numeric(y, y_name)
        if len(x) != len(y):
            raise DataError(f"{x_name} has {len(x)} rows, {y_name} has {len(y)}: they must agree")
        if x.nbytes <= LARGE:  # a larger one is looked at batch by batch, as it is read
            check_finite(x, x_name)
        check_finite(y, y_name)
        kind = targets_are or ("values" if y.dtype.kind == "f" else "classes")
        if kind == "classes":
            y, outputs = _classes(y, y_name, num_outputs), num_outputs
        else:
            y = y[:, None] if y.ndim == 1 else y
            outputs = num_outputs or y.shape[-1]
            if outputs != y.shape[-1]:
                raise DataError(f"{y_name}: num_outputs={num_outputs}, but a target has {y.shape[-1]} values")
        self.targets_are = kind
        self.scale = scale
        super().__init__(
            torch.from_numpy(x),
            torch.from_numpy(y),
            num_outputs=outputs or int(y.max()) + 1,
            name=name,
            source=path or f"{inputs}, {targets}",
        )
        self.mapped = x.nbytes > LARGE
        self._inputs_are = x_name

    def gather(self, indices: Indices) -> Pair:
        inputs, targets = super().gather(indices)
        if self.mapped:
            refuse_not_finite(inputs, lambda row: f"{self._inputs_are}, row {int(indices[row])} (from 0)")
        return inputs, targets

    def decode(self, inputs: Tensor, targets: Tensor) -> Pair:
        if inputs.is_floating_point() or self.scale is not None:
            inputs = inputs.float() if self.scale is None else inputs.float() * self.scale
        else:
            inputs = inputs.long()
        return inputs, targets.long() if self.targets_are == "classes" else targets.float()

    def decoding(self) -> str:
        return f"targets_are={self.targets_are} scale={self.scale}"


def _load_npy(file: Path) -> Array:
    if not file.is_file():
        raise DataError(f"{file} doesn't exist: give an .npy file")
    try:
        # mode c: writes, if anyone made one, would stay in memory; torch wants it writeable
        return np.asarray(np.lib.format.open_memmap(file, mode="c"))
    except (ValueError, OSError, EOFError) as error:
        if "Python objects" in str(error):
            raise DataError(_objects(str(file))) from error
        raise DataError(f"{file} is not a whole .npy file: {_one_line(error)}") from error


def _load_npz(file: Path, keys: tuple[str, str], given: str) -> tuple[Array, Array]:
    if not file.is_file():
        raise DataError(f"{given} doesn't exist: give an .npz file with data.path=FILE.npz")
    if not zipfile.is_zipfile(file):
        raise DataError(f"{given} is not an .npz archive: write one with numpy.savez(file, {keys[0]}=…, {keys[1]}=…)")
    key = ""
    try:
        with np.load(file, allow_pickle=False) as archive:
            for key in keys:
                if key not in archive.files:
                    raise DataError(f"{given} has no array {key!r}; it has {', '.join(sorted(archive.files))}")
            loaded: list[Array] = []
            for key in keys:
                mapped = _member(file, f"{key}.npy")
                loaded.append(archive[key] if mapped is None else mapped)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise DataError(_objects(f"{given} [{key}]")) from error
        raise DataError(f"{given} [{key}] can't be read: {_one_line(error)}") from error
    return loaded[0], loaded[1]


def _member(file: Path, name: str) -> Array | None:
    """An array in a .npz, memory-mapped where it is large and lies there uncompressed."""
    with zipfile.ZipFile(file) as archive, file.open("rb") as content:
        entry = archive.getinfo(name)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size <= LARGE:
            return None
        content.seek(entry.header_offset + 26)  # where the local header says how long it is
        name_length, extra_length = struct.unpack("<HH", content.read(4))
        content.seek(entry.header_offset + 30 + name_length + extra_length)
        version = np.lib.format.read_magic(content)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read(content)
        if dtype.hasobject:
            raise ValueError("holds Python objects")
        return np.asarray(np.memmap(file, dtype, "c", content.tell(), shape, "F" if by_column else "C"))


def _objects(where: str) -> str:
    return f"{where} holds Python objects, which would have to be unpickled: save plain numbers"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _numeric(array: Array, where: str) -> Array:
    """In a type that torch holds: native byte order, floats and integers as narrow as they are."""
    if array.dtype.kind == "O":
        raise DataError(_objects(where))
    if array.dtype.kind not in "fiub":
        raise DataError(f"{where} holds {array.dtype}: give real numbers")
    if array.ndim == 0:
        raise DataError(f"{where} is a single number: give one row per sample")
    if len(array) == 0:
        raise DataError(f"{where} has no rows")
    if array.dtype == np.uint64 and int(array.max()) > np.iinfo(np.int64).max:
        raise DataError(f"{where} holds {array.max()}: integers must be below 2**63")
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        return array.astype(np.int64)  # torch does little with wide unsigned integers
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return array.astype(np.float64)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def check_finite(array: Array, where: str) -> None:
    """DataError naming the first row, counted from 0, that holds NaN or infinity."""
    if array.dtype.kind != "f":
        return
    for start, piece in _pieces(array):
        bad = ~np.isfinite(piece).reshape(len(piece), -1).all(axis=1)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            values = piece[row].reshape(-1)
            value = values[~np.isfinite(values)][0]
            raise DataError(f"{where}, row {start + row} (from 0): holds {value}: mend or drop it")


def _pieces(array: Array) -> list[tuple[int, Array]]:
    step = max(1, _CHUNK_BYTES * len(array) // max(1, array.nbytes))
    return [(start, array[start : start + step]) for start in range(0, len(array), step)]


def _classes(labels: Array, where: str, num_outputs: int | None) -> Array:
    """The labels as integers, each from 0 to num_outputs - 1."""
    for start, piece in _pieces(labels):
        flat = piece.reshape(len(piece), -1)
        above = np.zeros_like(flat, dtype=bool) if num_outputs is None else flat >= num_outputs
        for wrong, why in (
            (flat != np.floor(flat), "is not a whole number"),
            (flat < 0, "is negative: classes count from 0"),
            (above, f"is not below num_outputs={num_outputs}"),
        ):
            if wrong.any():
                row, column = np.argwhere(wrong)[0]
                raise DataError(f"{where}, row {start + row} (from 0): label {flat[row, column]} {why}")
    return labels if labels.dtype.kind in "iu" else labels.astype(np.int64)
