"""A data set of the Hugging Face library `datasets`, saved on disk with `save_to_disk`."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from descent.data.bad_records import BadRecords, refuse_not_finite
from descent.data.base import BatchDataset, Indices, Pair, check_indices, digest_of
from descent.data.image_decoding import open_image, read_whole
from descent.errors import DataError


class HuggingFace(BatchDataset):
    """inputs [n, ...] and targets [n, ...] from two columns, memory-mapped by the library.

    path: the folder that `save_to_disk` wrote. part: which data set of a DatasetDict.
    Inputs of floats become float32. Inputs of whole numbers are tokens (int64), or with `scale` float32:
    the number times `scale` (images: 1/255), the channel axis first. A target of whole numbers is a class,
    a target of floats a value (float32 [n, 1]).

    Raises DataError where the library is missing, and for a folder that the library can't load.
    """

    def __init__(
        self,
        path: str | None = None,
        input: str = "image",
        target: str = "label",
        part: str | None = None,
        scale: float | None = None,
        num_outputs: int | None = None,
        name: str = "hugging_face",
    ) -> None:
        if path is None:
            raise DataError("data.path is not set: give the folder that save_to_disk wrote")
        self.name, self.source, self.scale = name, path, scale
        self._input, self._target = input, target
        data = _load(path, part)
        for column in (input, target):
            if column not in data.column_names:
                raise DataError(f"{path}: no column {column!r}; there are {', '.join(data.column_names)}")
        self._images: Any = None
        columns = data.select_columns([input, target])
        if isinstance(data.features[input], _library().Image):
            # The library would give a palette's indices as pixels, and clip 16 bits: the files' bytes are decoded here.
            self._images = data.select_columns([input]).cast_column(input, _library().Image(decode=False))
            columns = data.select_columns([target])
        self._data = columns.with_format("numpy")
        if len(data) == 0:
            raise DataError(f"{path}: no rows")
        self._fingerprint = str(data._fingerprint)
        feature = data.features[target]
        if isinstance(feature, _library().ClassLabel):
            self.class_names = tuple(feature.names)
        known = len(self.class_names) if self.class_names is not None else None
        self._lock = threading.Lock()
        x, y = self.gather(np.array([0], dtype=np.int64))
        self.input_shape = tuple(x.shape[1:])
        if y.is_floating_point():
            self.num_outputs = y.shape[-1]
        else:
            self.num_outputs = num_outputs or known or self._highest(target) + 1

    def _highest(self, target: str) -> int:
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self._data.data.column(target)
        while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            column = pc.list_flatten(column)
        return int(pc.max(column).as_py())

    @property
    def digest(self) -> str:
        return digest_of([], self._fingerprint, f"{self._input} {self._target} {self.scale}")

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Pair:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        inputs, targets = self.gather(np.array([index % len(self)], dtype=np.int64))
        return inputs[0], targets[0]

    def gather(self, indices: Indices) -> Pair:
        """Inputs and targets of the samples; BadRecords for NaN, DataError for rows of different shapes."""
        check_indices(indices, len(self))
        try:
            with self._lock:  # the library doesn't say that several threads may read
                rows = self._data[indices]
                files = None if self._images is None else self._images[indices][self._input]
        except Exception as error:  # the library's decoders raise exceptions of any class
            raise DataError(f"{self.source}: can't be read: {' '.join(str(error).split())[:300]}") from error
        x = self._tensor(rows[self._input]) if files is None else self._pixels(files, indices)
        y = self._tensor(rows[self._target])
        if self.scale is not None:
            inputs = x.float() * self.scale
            if inputs.dim() in (3, 4):  # images: channels first
                inputs = inputs[:, None] if inputs.dim() == 3 else inputs.movedim(-1, 1).contiguous()
        else:
            inputs = x.float() if x.is_floating_point() else x.long()
        targets = y.float() if y.is_floating_point() else y.long()
        if targets.is_floating_point() and targets.dim() == 1:
            targets = targets[:, None]
        for values in (inputs, targets):
            refuse_not_finite(values, lambda row: f"{self.source}, row {int(indices[row])} (from 0)")
        return inputs, targets

    def _pixels(self, files: list[dict[str, Any]], indices: Indices) -> Tensor:
        """Bytes [n, rows, columns] of grey images, or [n, rows, columns, 3]; BadRecords for what can't be decoded."""
        images, bad = [], list[tuple[int, str]]()
        for row, file in enumerate(files):
            try:
                content = file["bytes"] if file["bytes"] is not None else read_whole(file["path"])
                images.append(np.asarray(open_image(content, None)))
            except (ValueError, OSError, TypeError) as error:
                bad.append((row, str(error)))
        if bad:
            first, why = bad[0]
            raise BadRecords(
                f"{self.source}, row {int(indices[first])} (from 0), column {self._input!r}: {why}",
                [row for row, _ in bad],
            )
        if len({image.shape for image in images}) > 1:
            shapes = sorted({image.shape for image in images})
            raise DataError(f"{self.source}: a column gives images of different shapes ({shapes[0]}, {shapes[-1]})")
        return torch.from_numpy(np.stack(images))

    def _tensor(self, column: Any) -> Tensor:
        array = np.asarray(column)
        if array.dtype.kind not in "fiub":
            raise DataError(
                f"{self.source}: a column gives {array.dtype} (rows of different shapes, or text): give numbers of one shape"
            )
        if array.dtype.kind == "u" and array.dtype.itemsize > 1:
            array = array.astype(np.int64)
        return torch.from_numpy(np.ascontiguousarray(array))


class HuggingFaceRows:
    """Samples are dicts {column: tensor or text}, for models and collate functions that take columns by name.

    path: the folder that `save_to_disk` wrote. part: which data set of a DatasetDict. columns: null for all.
    `classes` has the names of the classes where one of the columns is of classes.

    Raises DataError where the library is missing, for a folder that the library can't load, and for unknown columns.
    """

    def __init__(
        self,
        path: str | None = None,
        columns: list[str] | str | None = None,
        part: str | None = None,
        name: str = "hugging_face_rows",
    ) -> None:
        if path is None:
            raise DataError("data.path is not set: give the folder that save_to_disk wrote")
        self.name, self.source = name, path
        data = _load(path, part)
        chosen = (
            list(data.column_names) if columns is None else [columns] if isinstance(columns, str) else list(columns)
        )
        for column in chosen:
            if column not in data.column_names:
                raise DataError(f"{path}: no column {column!r}; there are {', '.join(data.column_names)}")
        if not chosen:
            raise DataError("data.columns is empty: name at least one column, or null for all")
        labels = [data.features[c] for c in chosen if isinstance(data.features[c], _library().ClassLabel)]
        self.classes = list(labels[0].names) if len(labels) == 1 else None
        self._data = data.select_columns(chosen).with_format("torch")

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._data[index]
        return row

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._data.__getitems__(indices)
        return rows


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            'data=hugging_face: needs the library datasets: pip install "descent-service[huggingface]"'
        ) from error
    return datasets


def _load(path: str, part: str | None) -> Any:
    datasets = _library()
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder} doesn't exist: give the folder that save_to_disk wrote")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder}: can't be loaded: {' '.join(str(error).split())[:300]}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if part not in loaded:
            raise DataError(f"{folder}: data.part={part}: has the parts {', '.join(loaded)}; name one")
        return loaded[part]
    if part is not None:
        raise DataError(f"{folder}: data.part={part}: has no parts; set it to null")
    return loaded
