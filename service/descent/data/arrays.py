"""Your own arrays: two .npy files, or one .npz."""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from descent.data.bad_records import FLOAT32_MAX, KnownBad, Policy, refuse_not_finite
from descent.data.base import LARGE, Indices, Pair, TensorData
from descent.data.batch import Array
from descent.data.preprocessing import Scale
from descent.data.regular_files import require_file
from descent.data.row_cache import memory_bytes
from descent.data.shards import local_file
from descent.errors import DataError

_CHUNK_BYTES = 16 << 20  # checks read in pieces, so that a memory-mapped file stays on disk


class Arrays(TensorData):
    """inputs [num_samples, *input_shape] and targets [num_samples] or [num_samples, values].

    Give `path`, an .npz file that holds both, or `inputs` and `targets`, two .npy files, here or on s3://.
    The files are memory-mapped, so that they may be larger than memory; an array that was compressed is
    read whole, and refused where it unpacks to more than `max_mb` (null: half of the memory). Nothing is
    ever unpickled.

    Inputs: floats become float32. Integers stay integers (int64: tokens), unless `scale` is given: then
    they become float32 times `scale` (images: 1/255 = 0.00392156862745098).
    Targets: integers are class numbers (int64), floats are values to regress (float32, at least one
    column: [n, 1]). `targets_are` says 'classes' or 'values' where the type doesn't.
    num_outputs: by default the highest class + 1, or the number of values in a target.
    on_error: with 'skip', a row with a NaN, an infinity, a number beyond float32 or an impossible label
    is a bad record; with 'fail', the data is refused.

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
        max_mb: float | None = None,
        on_error: Policy = "fail",
        name: str = "arrays",
    ) -> None:
        if targets_are not in (None, "classes", "values"):
            raise DataError(f"{name}: targets_are={targets_are!r} is neither classes nor values")
        files, x_name, y_name = _locate(path, inputs, targets, inputs_key, targets_key, name)
        if path is not None:
            most = memory_bytes() // 2 if max_mb is None else int(max_mb * 2**20)
            x, y = _load_npz(files[0], (inputs_key, targets_key), path, most)
        else:
            x, y = _load_npy(files[0]), _load_npy(files[1])
        x, y = _numeric(x, x_name), _numeric(y, y_name)
        if len(x) != len(y):
            raise DataError(f"{x_name} has {len(x)} rows, {y_name} has {len(y)}: they must agree")
        flaws = _Flaws(len(x), on_error)
        mapped = x.nbytes > LARGE  # then the inputs are checked batch by batch, as they are read
        if not mapped:
            flaws.find_not_finite(x, x_name, 1.0 if scale is None else scale)
        flaws.find_not_finite(y, y_name, 1.0)
        kind = targets_are or ("values" if y.dtype.kind == "f" else "classes")
        if kind == "classes":
            flaws.find_bad_labels(y, y_name, num_outputs)
            y = flaws.without(y)
            y = y if y.dtype.kind in "iu" else y.astype(np.int64)
            outputs = num_outputs or int(y.max()) + 1
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
            num_outputs=outputs,
            name=name,
            source=path or f"{inputs}, {targets}",
            preprocessing=None if scale is None else Scale(scale, torch.from_numpy(x).dtype),
            mapped=files if mapped else (),
            bad=flaws.known_bad(),
        )
        self._inputs_name = x_name

    def gather(self, indices: Indices) -> Pair:
        inputs, targets = super().gather(indices)
        if not self.in_memory:
            refuse_not_finite(inputs, lambda row: f"{self._inputs_name}, row {int(indices[row])} (from 0)")
        return inputs, targets

    def decode(self, inputs: Tensor, targets: Tensor) -> Pair:
        if inputs.is_floating_point() or self.scale is not None:
            inputs = inputs.float() if self.scale is None else inputs.float() * self.scale
        else:
            inputs = inputs.long()
        return inputs, targets.long() if self.targets_are == "classes" else targets.float()

    def decode_settings(self) -> str:
        return f"targets_are={self.targets_are} scale={self.scale}"


class _Flaws:
    """Looks for rows that can't be used: the first one raises DataError, or all are noted where they are to be skipped."""

    def __init__(self, length: int, on_error: Policy) -> None:
        self._is_bad = np.zeros(length, dtype=bool)
        self._first: dict[int, str] = {}
        self._on_error = on_error

    def find_not_finite(self, array: Array, where: str, scale: float) -> None:
        """Rows that hold NaN, infinity, or a number that `scale` takes beyond float32."""
        if array.dtype.kind != "f":
            return
        for start, piece in _pieces(array):
            flat = piece.reshape(len(piece), -1)
            with np.errstate(over="ignore", invalid="ignore"):
                bad = ~np.isfinite(flat.astype(np.float32) * np.float32(scale))
            for row in np.flatnonzero(bad.any(axis=1)).tolist():
                column = int(bad[row].argmax())
                value = flat[row, column]
                beyond = f", beyond float32 ({FLOAT32_MAX:.3g})" if np.isfinite(value) else ""
                place = f" in column {column}" if flat.shape[1] > 1 else ""
                self._note(
                    start + row, f"{where}, row {start + row} (from 0): holds {value}{place}{beyond}: mend or drop it"
                )

    def find_bad_labels(self, labels: Array, where: str, num_outputs: int | None) -> None:
        """Rows with a label that isn't a whole number from 0 to num_outputs - 1."""
        for start, piece in _pieces(labels):
            flat = piece.reshape(len(piece), -1)
            above = np.zeros_like(flat, dtype=bool) if num_outputs is None else flat >= num_outputs
            for wrong, why in (
                (flat != np.floor(flat), "is not a whole number"),
                (flat < 0, "is negative: classes count from 0"),
                (above, f"is not below num_outputs={num_outputs}"),
            ):
                for row in np.flatnonzero(wrong.any(axis=1)).tolist():
                    label = flat[row, wrong[row].argmax()]
                    self._note(start + row, f"{where}, row {start + row} (from 0): label {label} {why}")

    def _note(self, row: int, message: str) -> None:
        if self._on_error == "fail":
            raise DataError(message)
        self._is_bad[row] = True
        self._first.setdefault(row, message)

    def without(self, labels: Array) -> Array:
        """The labels, with 0 in place of the bad ones."""
        if not self._is_bad.any():
            return labels
        labels = np.array(labels)
        labels[self._is_bad] = 0
        return labels

    def known_bad(self) -> KnownBad | None:
        return KnownBad(self._is_bad, self._first.__getitem__) if self._is_bad.any() else None


def _locate(
    path: str | None, inputs: str | None, targets: str | None, inputs_key: str, targets_key: str, name: str
) -> tuple[list[Path], str, str]:
    """(the files, the inputs' name for messages, the targets'). Raises DataError unless one of the two forms is given."""
    if path is not None and (inputs or targets):
        raise DataError(f"{name}: give either path (.npz) or inputs and targets (.npy)")
    if path is not None:
        return [local_file(path)], f"{path} [{inputs_key}]", f"{path} [{targets_key}]"
    if inputs is not None and targets is not None:
        return [local_file(inputs), local_file(targets)], inputs, targets
    raise DataError(
        "data.path is not set: give data.path=FILE.npz, or both data.inputs=FILE.npy and data.targets=FILE.npy"
    )


def _load_npy(file: Path) -> Array:
    require_file(file, "give an .npy file")
    try:
        # Torch wants a writeable array; with mode c a write would stay in memory.
        return np.asarray(np.lib.format.open_memmap(file, mode="c"))
    except (ValueError, OSError, EOFError) as error:
        if "Python objects" in str(error):
            raise DataError(_objects(str(file))) from error
        raise DataError(f"{file} is not a whole .npy file: {_one_line(error)}") from error


def _load_npz(file: Path, keys: tuple[str, str], given: str, most: int) -> tuple[Array, Array]:
    """Both arrays; one that must be unpacked to more than `most` bytes is refused."""
    require_file(file, "give an .npz file with data.path=FILE.npz")
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
                mapped = _member(file, f"{key}.npy", f"{given} [{key}]", most)
                loaded.append(archive[key] if mapped is None else mapped)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise DataError(_objects(f"{given} [{key}]")) from error
        raise DataError(f"{given} [{key}] can't be read: {_one_line(error)}") from error
    return loaded[0], loaded[1]


def _member(file: Path, name: str, where: str, most: int) -> Array | None:
    """An array of an .npz, memory-mapped where it is large and not compressed; None where it is to be read.

    Raises DataError where the array to be read has more than `most` bytes, or more than its file in the archive.
    """
    with zipfile.ZipFile(file) as archive:
        entry = archive.getinfo(name)
        with archive.open(entry) as content:
            shape, by_column, dtype = _header(content)
        if dtype.hasobject:
            raise ValueError("holds Python objects")
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if size > entry.file_size:
            raise DataError(
                f"{where}: its header promises {size:,} bytes, the archive has {entry.file_size:,}: it is broken"
            )
        stored = entry.compress_type == zipfile.ZIP_STORED
        if stored and entry.file_size > LARGE:
            with file.open("rb") as content:
                content.seek(
                    entry.header_offset + 26
                )  # the zip's header in front of the entry ends with its own length
                name_length, extra_length = struct.unpack("<HH", content.read(4))
                content.seek(entry.header_offset + 30 + name_length + extra_length)
                _header(content)
                return np.asarray(np.memmap(file, dtype, "c", content.tell(), shape, "F" if by_column else "C"))
        if size > most:
            raise DataError(
                f"{where}: unpacks to {size / 2**20:,.0f} MB, more than data.max_mb={most / 2**20:,.0f} (by default half "
                "of the memory): write it with numpy.savez, not savez_compressed, so that it can be memory-mapped"
            )
        return None


def _header(content: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether columns lie together, type) of the .npy file that begins here."""
    version = np.lib.format.read_magic(content)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(content)


def _objects(where: str) -> str:
    return f"{where} holds Python objects, which would have to be unpickled: save plain numbers"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _numeric(array: Array, where: str) -> Array:
    """The array in a type that torch has: native byte order; floats and integers stay as narrow as they are."""
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


def _pieces(array: Array) -> list[tuple[int, Array]]:
    step = max(1, _CHUNK_BYTES * len(array) // max(1, array.nbytes))
    return [(start, array[start : start + step]) for start in range(0, len(array), step)]
