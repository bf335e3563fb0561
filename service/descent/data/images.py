"""Images on disk: a folder per class, or tar shards with an index."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from descent.data.base import Indices, Pair, check_inside, digest_of
from descent.data.decoding import Decoder
from descent.data.files import is_remote, open_data
from descent.data.pictures import Files, Form, Item, decode
from descent.data.records import BadRecords
from descent.data.shards import INDEX, Layout, ShardFiles, layout_of, read_index
from descent.data.tar_shards import Members
from descent.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class Images(Dataset[Pair]):
    """inputs float32 [n, channels, height, width]: (pixel / 255 - mean) / std; targets int64 [n].

    path: a folder with one folder of images per class (classes in the order of their names),
    or a folder or s3://… of tar shards with the index that `descent data index` writes.
    size: [height, width] to which all are scaled; null takes the first image's, and one that
    differs is a bad record, like one that can't be decoded.
    processes: that decode, besides this one; 0 for none. Up to `keep_mb` of decoded pixels are
    kept in memory, so that later epochs decode nothing; 0 for none.
    window: see Tokens; local sets are shuffled freely unless it is set.

    Raises DataError for a missing folder or index; BadRecords names file, or shard and index.
    """

    def __init__(
        self,
        path: str | None = None,
        size: list[int] | None = None,
        channels: int = 3,
        mean: float | list[float] = 0.0,
        std: float | list[float] = 1.0,
        processes: int = 0,
        keep_mb: float = 1024.0,
        window: int | None = None,
        name: str = "images",
    ) -> None:
        if path is None:
            raise DataError("data.path is not set: give a folder with one folder of images a class")
        if channels not in (1, 3):
            raise DataError(f"{name}: channels={channels} must be 3 (colour) or 1 (grey)")
        if processes < 0:
            raise DataError(f"{name}: processes={processes}: give 0 or more")
        self.name, self.source = name, path
        self._files = _open(path)
        self.classes, self.targets = self._files.classes, self._files.targets
        self.num_outputs = len(self.classes)
        self.form = self._form(size, channels)
        self.input_shape = self.form.shape
        self._mean, self._std = _by_channel(mean, channels, "mean"), _by_channel(std, channels, "std")
        if not bool((self._std > 0).all()):
            raise DataError(f"{name}: std={std} must be above 0")
        self._decoder = Decoder(self.form, processes)
        self.readers = 2 if processes else 1
        """Batches that are worth reading at the same time: the processes decode on while one is made."""
        counts = self._files.counts
        ordered = self._files.remote or (window is not None and counts is not None)
        self.layout: Layout | None = layout_of(counts, window) if ordered and counts else None
        if self.layout is not None and isinstance(self._files, Members):
            self._files.shards.check_room(self.layout)
        self._kept: Tensor | None = None
        self._have = np.zeros(0, dtype=bool)
        if len(self) * math.prod(self.form.shape) <= keep_mb * 2**20:
            self._kept = torch.empty((len(self), *self.form.shape), dtype=torch.uint8)
            self._have = np.zeros(len(self), dtype=bool)

    def _form(self, size: list[int] | None, channels: int) -> Form:
        if size is not None:
            if len(size) != 2 or min(size) < 1:
                raise DataError(f"{self.name}: size={size} must be [height, width]")
            return Form(channels, size[0], size[1], resize=True)
        from io import BytesIO

        from PIL import Image

        try:
            with Image.open(BytesIO(Files().read(self._files.item(0)))) as first:
                width, height = first.size
        except Exception as error:
            raise DataError(f"{self._files.where(0)}: is not an image: {error}") from error
        return Form(channels, height, width, resize=False)

    @property
    def digest(self) -> str:
        told = f"{self.form} mean={self._mean.tolist()} std={self._std.tolist()}"
        return digest_of([self.targets], told, self._files.digest)

    @property
    def in_memory(self) -> bool:
        """Whether a batch costs no reading and decoding any more."""
        return False

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Pair:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        at = index % len(self)
        try:
            pixels = decode(Files().read(self._files.item(at)), self.form)
        except (ValueError, OSError) as error:
            raise BadRecords([0], f"{self._files.where(at)}: {error}") from error
        inputs, targets = self._decoded(torch.from_numpy(np.array(pixels))[None], np.array([at]))
        return inputs[0], targets[0]

    def expect(self, shards: Indices) -> None:
        """These shards are needed soon: fetch them in the background where they aren't here."""
        if isinstance(self._files, Members):
            self._files.shards.expect(shards.tolist())

    def gather(self, indices: Indices) -> Pair:
        """Inputs and targets of the samples; BadRecords has all of a batch that can't be decoded."""
        check_inside(indices, len(self))
        if self._kept is None:
            return self._decoded(self._decode(indices, np.arange(len(indices))), indices)
        new = np.flatnonzero(~self._have[indices])
        if len(new):
            at = torch.from_numpy(np.ascontiguousarray(indices[new]))
            self._kept.index_copy_(0, at, self._decode(indices[new], new))
            self._have[indices[new]] = True
        at = torch.from_numpy(np.ascontiguousarray(indices))
        return self._decoded(self._kept.index_select(0, at), indices)

    def _decode(self, indices: Indices, rows: Indices) -> Tensor:
        pixels, bad = self._decoder.read(self._files.items(indices))
        if bad:
            places = [int(rows[place]) for place, _ in bad]
            first, why = bad[0]
            raise BadRecords(places, f"{self._files.where(int(indices[first]))}: {why}")
        return torch.from_numpy(pixels)

    def _decoded(self, pixels: Tensor, indices: Indices) -> Pair:
        floats = pixels.float().div_(255.0).sub_(self._mean).div_(self._std)
        at = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        return floats, self.targets.index_select(0, at)


def _by_channel(value: float | list[float], channels: int, key: str) -> Tensor:
    values = value if isinstance(value, list) else [value] * channels
    if len(values) != channels:
        raise DataError(f"data.{key}={value}: give one number, or one for each of {channels} channels")
    return torch.tensor(values, dtype=torch.float32).view(channels, 1, 1)


class _Folder:
    """One file per image, one folder per class."""

    remote = False
    counts: list[int] | None = None

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder} doesn't exist: give a folder with one folder of images a class")
        named = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        self._paths: list[str] = []
        labels: list[int] = []
        self.classes = [p.name for p in named]
        for label, place in enumerate(named):
            found = sorted(str(p) for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(f"{place}: holds no image ({', '.join(SUFFIXES)})")
            self._paths += found
            labels += [label] * len(found)
        if not self._paths:
            raise DataError(f"{folder}: has no folders of images in it, one for each class")
        self._folder = folder
        self.targets = torch.tensor(labels, dtype=torch.int64)

    @property
    def digest(self) -> str:
        """Over names and sizes: hashing the images would read them all."""
        told = (f"{Path(p).relative_to(self._folder)} {Path(p).stat().st_size}" for p in self._paths)
        return digest_of([], *told)

    def item(self, sample: int) -> Item:
        return self._paths[sample], 0, 0

    def items(self, samples: Indices) -> list[Item]:
        return [(self._paths[sample], 0, 0) for sample in samples.tolist()]

    def where(self, sample: int) -> str:
        return f"{self._paths[sample]} (sample {sample})"


def _open(path: str) -> Any:
    if not is_remote(path) and not (Path(path).expanduser() / INDEX).is_file():
        return _Folder(Path(path).expanduser())
    store = open_data(path)
    index = read_index(store, "images")
    return Members(path, ShardFiles(store, index))
