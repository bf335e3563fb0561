"""Images in tar shards, and the table of where each image lies, which `descent data index` writes.

`index.json` and `members.bin` lie beside the shards. `members.bin` holds three little-endian 64-bit
numbers for each image, in the order of the shards: first byte, number of bytes, class.
"""

import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from descent.data.batch import Indices
from descent.data.image_decoding import Item
from descent.data.layout import Layout, layout_of
from descent.data.regular_files import is_hidden
from descent.data.shards import ShardFiles, ShardIndex, parse_shard, shard_of
from descent.errors import DataError

MEMBERS = "members.bin"


class TarImages:
    """The images of tar shards, by number. `Folder` in images.py has the same members."""

    def __init__(self, path: str, shards: ShardFiles) -> None:
        self.shards = shards
        about, index = shards.index.about, shards.index
        classes = about.get("classes")
        if not isinstance(classes, list) or not classes:
            raise DataError(f"{path}/index.json: about.classes must be a list of names")
        self.class_names = tuple(str(name) for name in classes)
        listed = about.get("members")
        if not isinstance(listed, dict):
            raise DataError(f"{path}/index.json: about.members must name {MEMBERS}")
        one = ShardIndex("members", (parse_shard(listed, f"{path}/index.json, about.members"),), {})
        file = ShardFiles(shards.store, one).path(0)
        table = np.memmap(file, dtype="<i8", mode="r").reshape(-1, 3)
        if len(table) != index.samples:
            raise DataError(f"{path}/{MEMBERS}: has {len(table)} images, the index {index.samples}")
        self._extents = table[:, :2]
        self.targets = torch.from_numpy(np.array(table[:, 2], dtype=np.int64))
        if not 0 <= int(self.targets.min()) <= int(self.targets.max()) < len(self.class_names):
            raise DataError(f"{path}/{MEMBERS}: has a class outside the {len(self.class_names)} of the index")
        self.counts: list[int] | None = [shard.samples for shard in index.shards]
        self._starts = layout_of(self.counts, None).starts

    @property
    def remote(self) -> bool:
        return self.shards.remote

    @property
    def digest(self) -> str:
        return self.shards.index.digest

    def _shard(self, sample: int) -> int:
        return int(np.searchsorted(self._starts, sample, side="right")) - 1

    def item(self, sample: int) -> Item:
        first, size = self._extents[sample].tolist()
        return str(self.shards.path(self._shard(sample))), first, size

    def items(self, samples: Indices) -> list[Item]:
        numbers = np.searchsorted(self._starts, samples, side="right") - 1
        paths = {n: str(self.shards.path(n)) for n in np.unique(numbers).tolist()}
        rows = self._extents[samples].tolist()
        return [(paths[n], *row) for n, row in zip(numbers.tolist(), rows, strict=True)]

    def prefetch(self, shards: Indices) -> None:
        """Fetch these shards in the background, in this order."""
        self.shards.prefetch(shards.tolist())

    @property
    def files(self) -> tuple[Path, ...]:
        """The local shards, which are read while a run trains."""
        return self.shards.local

    def check_room(self, layout: Layout) -> None:
        """Raise DataError where the cache can't hold the shards that are in use at the same time."""
        self.shards.check_room(layout)

    def location(self, sample: int) -> str:
        shard = self._shard(sample)
        file = self.shards.index.shards[shard].file
        return f"{self.shards.store.address}/{file}, image {sample - int(self._starts[shard])} (from 0)"


def index_tars(
    folder: Path, files: list[Path], suffixes: tuple[str, ...], progress: Callable[[int, int], None]
) -> ShardIndex:
    """Read through the tar files of a folder and write members.bin; the caller writes the index that is returned.

    An image's class is the content of the member with the image's name and the ending .cls, else the
    folder in which the image lies within the tar. Raises DataError naming the shard and the member.
    """
    total, done = sum(f.stat().st_size for f in files), 0
    found: list[list[tuple[int, int, str]]] = []
    for file in files:
        found.append(_members(file, suffixes))
        done += file.stat().st_size
        progress(done, total)
    names = {label for members in found for _, _, label in members}
    # Numeric names in numeric order: 2 before 10.
    classes = sorted(names, key=lambda n: (0, int(n), n) if n.isdigit() else (1, 0, n))
    numbers = {label: i for i, label in enumerate(classes)}
    rows = [(first, size, numbers[label]) for members in found for first, size, label in members]
    np.array(rows, dtype="<i8").tofile(folder / MEMBERS)
    listed = shard_of(folder / MEMBERS, MEMBERS, len(rows))
    shards = tuple(shard_of(f, f.name, len(m)) for f, m in zip(files, found, strict=True))
    return ShardIndex("images", shards, {"classes": classes, "members": vars(listed)})


def _members(file: Path, suffixes: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """(first byte, bytes, class) of each image in a tar."""
    images: list[tuple[str, int, int]] = []
    labels: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not member.isfile() or any(map(is_hidden, path.parts)):
                    continue
                if path.suffix.lower() in suffixes:
                    images.append((member.name, member.offset_data, member.size))
                elif path.suffix == ".cls":
                    content = tar.extractfile(member)
                    assert content is not None
                    labels[str(path.with_suffix(""))] = content.read().decode().strip()
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: is not a whole, uncompressed tar: {error}") from error
    if not images:
        raise DataError(f"{file}: holds no image ({', '.join(suffixes)})")
    rows = []
    for name, first, size in images:
        path = PurePosixPath(name)
        label = labels.get(str(path.with_suffix("")), path.parent.name)
        if not label:
            raise DataError(f"{file}, member {name}: has no class: put it in a folder, or a .cls beside it")
        if first + size > file.stat().st_size:
            raise DataError(f"{file}, member {name}: the file ends within it")
        rows.append((first, size, label))
    return rows
