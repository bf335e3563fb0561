"""Sharded data sets: the index that says what each shard holds, and the shards as local files.

The index, `index.json`, lies in the folder of the shards::

    {"format": "descent-shards-1", "kind": "tokens", "about": {"dtype": "uint16", …},
     "shards": [{"file": "shard-00000.bin", "bytes": 1048576, "sha256": "…", "samples": 524288}]}

`samples` counts tokens, images or rows, depending on the kind.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from descent.data.cache import node_cache
from descent.data.files import data_errors, find_file, is_remote, open_data
from descent.data.layout import Layout
from descent.errors import DataError
from descent.storage import Store, to_location
from descent.storage.atomic import write_atomic
from descent.storage.base import is_key

INDEX = "index.json"
_FORMAT = "descent-shards-1"
_FETCHERS = 2  # files fetched ahead at the same time; each file is fetched in parallel parts anyway


@dataclass(frozen=True)
class Shard:
    """One file of a sharded data set."""

    file: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class ShardIndex:
    """The content of `index.json`."""

    kind: str
    shards: tuple[Shard, ...]
    about: dict[str, Any]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over the whole index, and so over the content: the index holds the shards' hashes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        head = {"format": _FORMAT, "kind": self.kind, "about": self.about}
        return json.dumps({**head, "shards": [asdict(s) for s in self.shards]}, indent=1) + "\n"


@data_errors()
def read_index(store: Store, kind: str | None = None) -> ShardIndex:
    """The index in `store`, checked.

    kind: the kind that the caller can read; None for any. Raises DataError naming the file and the key.
    """
    where = f"{store.address}/{INDEX}"
    try:
        found = json.loads(store.get(INDEX))
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise DataError(f"{where}: is not an index of shards (format is not {_FORMAT})")
    if not isinstance(found.get("kind"), str) or kind not in (None, found["kind"]):
        raise DataError(
            f"{where}: kind is {found.get('kind')!r}, data of kind {kind!r} are needed: use data={found.get('kind')}"
        )
    about, listed = found.get("about"), found.get("shards")
    if not isinstance(about, dict) or not isinstance(listed, list) or not listed:
        raise DataError(f"{where}: needs an object 'about' and a list 'shards'")
    shards = tuple(parse_shard(entry, f"{where}, shard {i}") for i, entry in enumerate(listed))
    names = [shard.file for shard in shards]
    if len(set(names)) < len(names):
        raise DataError(f"{where}: names a file twice")
    return ShardIndex(found["kind"], shards, about)


def parse_shard(entry: Any, where: str) -> Shard:
    """The entry of one file in an index, whose name and hash are fit for use in paths. Raises DataError."""
    try:
        shard = Shard(**entry)
    except TypeError as error:
        raise DataError(f"{where}: needs exactly file, bytes, sha256, samples") from error
    numbers = (shard.bytes, shard.samples)
    if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in numbers):
        raise DataError(f"{where}: bytes and samples must be whole numbers, 0 or more")
    texts = (shard.file, shard.sha256)
    if not all(isinstance(x, str) for x in texts) or not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
        raise DataError(f"{where}: file must be a name and sha256 have 64 hexadecimal digits")
    if not is_key(shard.file) or "\\" in shard.file:
        raise DataError(f"{where}: file {shard.file!r} does not lie beside the index")
    return shard


def sha256_of(file: Path) -> str:
    """64 hexadecimal digits: the SHA-256 of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def shard_of(file: Path, name: str, samples: int) -> Shard:
    """The entry of a local file in an index."""
    return Shard(name, file.stat().st_size, sha256_of(file), samples)


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write the index of a local data set, whole or not at all."""
    write_atomic(folder / INDEX, index.to_json())


class ShardFiles:
    """The shards of one data set as local files: read in place where they are local, else through the node's cache.

    Raises DataError where a local shard's size differs from the index.
    """

    def __init__(self, store: Store, index: ShardIndex) -> None:
        self.store = store
        self.index = index
        self._fetchers: ThreadPoolExecutor | None = None
        self._fetching: dict[int, Future[Path]] = {}
        if store.folder is not None:
            for shard in index.shards:
                size = find_file(store, shard.file).size
                if size != shard.bytes:
                    raise DataError(
                        f"{store.address}/{shard.file}: has {size} bytes, the index says {shard.bytes}: "
                        "write it again, or its index (descent data index)"
                    )

    @property
    def remote(self) -> bool:
        return self.store.folder is None

    @property
    def local(self) -> tuple[Path, ...]:
        """The shards that are read in place; none where they come through the cache."""
        folder = self.store.folder
        return () if folder is None else tuple(folder / shard.file for shard in self.index.shards)

    def path(self, number: int) -> Path:
        """The local path of shard `number`; the shard is fetched and verified first if this node doesn't have it."""
        shard = self.index.shards[number]
        if self.store.folder is not None:
            return self.store.folder / shard.file
        fetching = self._fetching.pop(number, None)
        if fetching is not None and not fetching.cancel():
            fetching.exception()  # waits; where fetching failed, the next line tries again and raises why
        return node_cache().get(self.store, shard.file, shard.bytes, shard.sha256)

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Fetch these shards in the background, in this order: they are needed soon."""
        if self.store.folder is not None:
            return
        if self._fetchers is None:
            self._fetchers = ThreadPoolExecutor(_FETCHERS, "shards")
        for number in numbers:
            if number in self._fetching:
                continue
            shard = self.index.shards[number]
            self._fetching[number] = self._fetchers.submit(
                node_cache().get, self.store, shard.file, shard.bytes, shard.sha256
            )

    def check_room(self, layout: Layout) -> None:
        """Raise DataError where the cache can't hold the shards that are in use at the same time."""
        if self.store.folder is not None:
            return
        share = min(1.0, layout.window / max(1, int(layout.starts[-1])))
        in_use = min(self.index.bytes, 2 * math.ceil(self.index.bytes * share))
        largest = max(shard.bytes for shard in self.index.shards)
        needed = max(in_use, 2 * largest if len(self.index.shards) > 1 else largest)
        if needed > node_cache().max_bytes:
            raise DataError(
                f"data.cache.gb={node_cache().max_bytes / 1e9:g}: two windows of {layout.window} samples of "
                f"{self.store.address} take {needed / 1e9:.3g} GB; give it more, or a smaller data.window"
            )


@data_errors()
def local_file(uri: str) -> Path:
    """The local path of a file: the file itself, or its copy in the node's cache, fetched again where it has changed."""
    if not is_remote(uri):
        return Path(uri).expanduser()
    where = to_location(uri)
    store = open_data(where.parent)
    entry = find_file(store, where.name)
    key = hashlib.sha256(f"{uri} {entry.size} {entry.version}".encode()).hexdigest()
    return node_cache().get(store, where.name, entry.size, None, key=key)


@data_errors()
def size_of(uri: str) -> int:
    """The bytes of a file, known before the file is fetched; 0 for a local file that doesn't exist."""
    if not is_remote(uri):
        file = Path(uri).expanduser()
        return file.stat().st_size if file.is_file() else 0
    where = to_location(uri)
    return find_file(open_data(where.parent), where.name).size
