"""Images on disk: a folder of images for each class, or tar shards with an index."""

import math
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from descent.data.bad_records import BadRecords, Policy
from descent.data.base import BatchDataset, Indices, Pair, check_indices, digest_of
from descent.data.decoder_pool import DecoderPool
from descent.data.files import is_remote, open_data
from descent.data.image_decoding import FileReader, ImageForm, Item, decode, upright_size
from descent.data.layout import Layout, layout_of
from descent.data.preprocessing import NormalizePixels
from descent.data.regular_files import is_hidden
from descent.data.shards import INDEX, ShardFiles, read_index
from descent.data.tar_shards import TarImages
from descent.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_FIRST_TRIES = 1000


class ImageFiles(Protocol):
    """The images of a data set by number: where their bytes lie, and their classes."""

    class_names: tuple[str, ...]
    targets: Tensor
    """int64 [num_samples], the class of each image."""
    counts: list[int] | None
    """The images of each shard; None without shards."""

    @property
    def remote(self) -> bool:
        """Whether the files lie on another machine."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The local shards."""
        ...

    @property
    def digest(self) -> str: ...

    def item(self, sample: int) -> Item: ...

    def items(self, samples: Indices) -> list[Item]: ...

    def location(self, sample: int) -> str:
        """The image's place, for messages."""
        ...

    def prefetch(self, shards: Indices) -> None: ...

    def check_room(self, layout: Layout) -> None: ...


class Images(BatchDataset):
    """inputs float32 [n, channels, height, width]: (pixel / 255 - mean) / std; targets int64 [n].

    path: a folder with one folder of images for each class (classes in the order of their names), or a
    folder or s3://… of tar shards with the index that `descent data index` writes.
    size: [height, width] to which all images are scaled; null takes the first image's, and an image of
    another size is a bad record, like one that can't be decoded.
    background: the grey value, 0 to 255, that shows through transparent pixels; with null, an image that
    has any is a bad record.
    processes: the number of processes that decode; 0 decodes in the training process.
    keep_mb: where all decoded images take at most so much, they are kept, so that later epochs decode
    nothing; 0 keeps none.
    window: see `Tokens`; a local data set is shuffled freely unless it is set.
    on_error: with 'skip', the first image that can be decoded gives the size.

    Images are turned upright as their EXIF orientation says. Of 16 bits a channel, the upper 8 are read.
    Animations, pages, and pixels of 32 bits are bad records.

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
        background: int | None = None,
        on_error: Policy = "fail",
        name: str = "images",
    ) -> None:
        if path is None:
            raise DataError("data.path is not set: give a folder with one folder of images a class")
        if channels not in (1, 3):
            raise DataError(f"{name}: channels={channels} must be 3 (colour) or 1 (grey)")
        if processes < 0:
            raise DataError(f"{name}: processes={processes}: give 0 or more")
        if background is not None and not 0 <= background <= 255:
            raise DataError(f"{name}: background={background}: give a grey value from 0 to 255")
        self.name, self.source = name, path
        self._files = _open(path)
        self.class_names = self._files.class_names
        self.targets = self.labels = self._files.targets
        self.files = self._files.files
        self.num_outputs = len(self.class_names)
        self.form = self._form(size, channels, background, on_error)
        self.input_shape = self.form.shape
        self._mean, self._std = _by_channel(mean, channels, "mean"), _by_channel(std, channels, "std")
        if not bool((self._std > 0).all()):
            raise DataError(f"{name}: std={std} must be above 0")
        self.preprocessing = NormalizePixels(self._mean, self._std)
        self._decoders = DecoderPool(self.form, processes)
        # With processes, a second batch is worth reading: they decode it while the first is made into floats.
        self.readers = 2 if processes else 1
        counts = self._files.counts
        ordered = self._files.remote or (window is not None and counts is not None)
        self.layout = layout_of(counts, window) if ordered and counts else None
        if self.layout is not None:
            self._files.check_room(self.layout)
        self._kept: Tensor | None = None
        self._is_kept = np.zeros(0, dtype=bool)
        if len(self) * math.prod(self.form.shape) <= keep_mb * 2**20:
            self._kept = torch.empty((len(self), *self.form.shape), dtype=torch.uint8)
            self._is_kept = np.zeros(len(self), dtype=bool)

    def _form(self, size: list[int] | None, channels: int, background: int | None, on_error: Policy) -> ImageForm:
        if size is not None:
            if len(size) != 2 or min(size) < 1:
                raise DataError(f"{self.name}: size={size} must be [height, width]")
            return ImageForm(channels, size[0], size[1], resize=True, background=background)
        files = FileReader()
        for sample in range(min(len(self), _FIRST_TRIES)):
            try:
                content = files.read(self._files.item(sample))
                form = ImageForm(channels, *upright_size(content), resize=False, background=background)
                decode(content, form)
                return form
            except (ValueError, OSError) as error:
                if on_error == "fail":
                    raise DataError(f"{self._files.location(sample)}: {error}") from error
        raise DataError(
            f"{self.source}: none of the first {min(len(self), _FIRST_TRIES)} images can be read; is it the right folder?"
        )

    @property
    def digest(self) -> str:
        settings = f"{self.form} mean={self._mean.tolist()} std={self._std.tolist()} {list(self.class_names or ())}"
        return digest_of([self.targets], settings, self._files.digest)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Pair:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        at = index % len(self)
        try:
            pixels = decode(FileReader().read(self._files.item(at)), self.form)
        except (ValueError, OSError) as error:
            raise BadRecords(f"{self._files.location(at)}: {error}") from error
        inputs, targets = self._normalized(torch.from_numpy(np.array(pixels))[None], np.array([at]))
        return inputs[0], targets[0]

    def prefetch(self, shards: Indices) -> None:
        self._files.prefetch(shards)

    def gather(self, indices: Indices) -> Pair:
        """Inputs and targets of the samples; BadRecords has every image of the batch that can't be decoded."""
        check_indices(indices, len(self))
        if self._kept is None:
            return self._normalized(self._decode(indices, np.arange(len(indices))), indices)
        new = np.flatnonzero(~self._is_kept[indices])
        if len(new):
            at = torch.from_numpy(np.ascontiguousarray(indices[new]))
            self._kept.index_copy_(0, at, self._decode(indices[new], new))
            self._is_kept[indices[new]] = True
        at = torch.from_numpy(np.ascontiguousarray(indices))
        return self._normalized(self._kept.index_select(0, at), indices)

    def _decode(self, indices: Indices, rows: Indices) -> Tensor:
        """Pixels of the samples, which stand at `rows` of the batch."""
        pixels, bad = self._decoders.read(self._files.items(indices))
        if bad:
            first, why = bad[0]
            raise BadRecords(
                f"{self._files.location(int(indices[first]))}: {why}", [int(rows[place]) for place, _ in bad]
            )
        return torch.from_numpy(pixels)

    def _normalized(self, pixels: Tensor, indices: Indices) -> Pair:
        floats = pixels.float().div_(255.0).sub_(self._mean).div_(self._std)
        at = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        return floats, self.targets.index_select(0, at)


def _by_channel(value: float | list[float], channels: int, key: str) -> Tensor:
    values = value if isinstance(value, list) else [value] * channels
    if len(values) != channels:
        raise DataError(f"data.{key}={value}: give one number, or one for each of {channels} channels")
    return torch.tensor(values, dtype=torch.float32).view(channels, 1, 1)


class Folder:
    """A folder with one folder of image files for each class."""

    remote = False
    counts: list[int] | None = None

    files: tuple[Path, ...] = ()
    """Too many files to be watched."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder} doesn't exist: give a folder with one folder of images a class")
        found = sorted(p for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))
        self._paths: list[str] = []
        labels: list[int] = []
        self.class_names = tuple(p.name for p in found)
        for label, place in enumerate(found):
            images = sorted(
                str(p)
                for p in place.rglob("*")
                if p.suffix.lower() in SUFFIXES and not any(map(is_hidden, p.relative_to(place).parts))
            )
            if not images:
                raise DataError(f"{place}: holds no image ({', '.join(SUFFIXES)})")
            self._paths += images
            labels += [label] * len(images)
        if not self._paths:
            raise DataError(f"{folder}: has no folders of images in it, one for each class")
        self._folder = folder
        self.targets = torch.tensor(labels, dtype=torch.int64)

    @cached_property
    def digest(self) -> str:
        """Over the names and sizes of the files: hashing the images would read them all."""
        entries = (f"{Path(p).relative_to(self._folder)} {Path(p).stat().st_size}" for p in self._paths)
        return digest_of([], *entries)

    def item(self, sample: int) -> Item:
        return self._paths[sample], 0, 0

    def items(self, samples: Indices) -> list[Item]:
        return [(self._paths[sample], 0, 0) for sample in samples.tolist()]

    def location(self, sample: int) -> str:
        return f"{self._paths[sample]} (sample {sample})"

    def prefetch(self, shards: Indices) -> None:
        """Nothing to fetch: the files are here."""

    def check_room(self, layout: Layout) -> None:
        """Files that are here need no cache."""


def _open(path: str) -> ImageFiles:
    if not is_remote(path) and not (Path(path).expanduser() / INDEX).is_file():
        return Folder(Path(path).expanduser())
    store = open_data(path)
    return TarImages(path, ShardFiles(store, read_index(store, "images")))
