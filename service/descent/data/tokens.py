"""Token ids on disk, memory-mapped, for language models; `descent data tokenize` writes them."""

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from descent.data.bad_records import BadRecords
from descent.data.base import LARGE, BatchDataset, Indices, Pair, check_indices, digest_of
from descent.data.files import open_data
from descent.data.layout import layout_of
from descent.data.shards import ShardFiles, ShardIndex, read_index
from descent.errors import DataError

DTYPES: dict[str, np.dtype[Any]] = {
    "uint8": np.dtype("u1"),
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
}
_OPEN = 256  # shards that stay mapped, which takes address space and no memory


class Tokens(BatchDataset):
    """inputs int64 [n, block]: windows of token ids; targets int64 [n, block]: the tokens after them.

    path: a folder, or s3://…, with `index.json` and its shards. Windows don't overlap and don't cross
    shards. A local data set is memory-mapped, and its samples are shuffled freely. A data set on s3://
    is read shard by shard through the node's cache, in an order that shuffles the shards and then the
    samples inside each `window` (a number of samples; null: as many as 8 shards hold). With a number,
    a local data set is read in that order too.

    Raises DataError for a missing or malformed index, and for a shard whose size differs from the index.
    """

    def __init__(
        self, path: str | None = None, block: int = 128, window: int | None = None, name: str = "tokens"
    ) -> None:
        if path is None:
            raise DataError("data.path is not set: give the folder that descent data tokenize wrote")
        if block < 1:
            raise DataError(f"{name}: block={block} must be at least 1 token")
        store = open_data(path)
        self.index = read_index(store, "tokens")
        self._dtype = _dtype(self.index, path)
        self._shards = ShardFiles(store, self.index)
        self.num_outputs = self._vocabulary = int(self.index.about["vocabulary"])
        self._may_exceed = self._vocabulary < 1 << 8 * self._dtype.itemsize
        self.block, self.name, self.source = block, name, str(path)
        self.input_shape = (block,)
        counts = [max(0, shard.samples - 1) // block for shard in self.index.shards]
        self._starts = layout_of(counts, window).starts
        if len(self) == 0:
            raise DataError(
                f"{path}: no shard has the {block + 1} tokens that one window of block={block} needs; "
                "the largest has " + str(max(shard.samples for shard in self.index.shards))
            )
        ordered = self._shards.remote or window is not None
        self.layout = layout_of(counts, window) if ordered else None
        if self.layout is not None:
            self._shards.check_room(self.layout)
        # A small local data set lies in the operating system's page cache.
        self.in_memory = not self._shards.remote and self.index.bytes <= LARGE
        self.files = self._shards.local
        self._open: OrderedDict[int, NDArray[Any]] = OrderedDict()

    @property
    def digest(self) -> str:
        return digest_of([], f"tokens block={self.block}", self.index.digest)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Pair:
        inputs, targets = self.gather(np.array([index], dtype=np.int64))
        return inputs[0], targets[0]

    def prefetch(self, shards: Indices) -> None:
        self._shards.prefetch(shards.tolist())

    def gather(self, indices: Indices) -> Pair:
        """Inputs and targets int64 [n, block]; raises IndexError outside the data."""
        check_indices(indices, len(self))
        ids = np.empty((len(indices), self.block + 1), dtype=self._dtype)
        # Sorted, so that each shard is looked up once: a shuffled batch has a few samples in every shard.
        order = np.argsort(indices, kind="stable")
        wanted = indices[order]
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        firsts = np.flatnonzero(np.diff(shards, prepend=-1)).tolist()
        for first, stop in zip(firsts, [*firsts[1:], len(wanted)], strict=True):
            shard = int(shards[first])
            windows = self._windows(shard)
            ids[order[first:stop]] = windows[wanted[first:stop] - self._starts[shard]]
        if self._may_exceed and int(ids.max(initial=0)) >= self._vocabulary:
            rows = np.flatnonzero((ids >= self._vocabulary).any(axis=1))
            shard = int(np.searchsorted(self._starts, indices[rows[0]], side="right")) - 1
            raise BadRecords(
                f"{self.source}/{self.index.shards[shard].file}: sample {int(indices[rows[0]])} has the token "
                f"{ids[rows[0]].max()}, which is not below the vocabulary of {self._vocabulary}",
                rows.tolist(),
            )
        return (
            torch.from_numpy(ids[:, :-1].astype(np.int64)),
            torch.from_numpy(ids[:, 1:].astype(np.int64)),
        )

    def _windows(self, shard: int) -> NDArray[Any]:
        """[windows, block + 1]: each window and the token after it, as a view on the mapped file."""
        windows = self._open.get(shard)
        if windows is None:
            ids = np.asarray(np.memmap(self._shards.path(shard), dtype=self._dtype, mode="r"))
            windows = sliding_window_view(ids, self.block + 1)[:: self.block]
            self._open[shard] = windows
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return windows


def _dtype(index: ShardIndex, path: str) -> np.dtype[Any]:
    where = f"{path}/index.json"
    name, vocabulary = index.about.get("dtype"), index.about.get("vocabulary")
    if name not in DTYPES:
        raise DataError(f"{where}: dtype {name!r} is none of {', '.join(DTYPES)}")
    if not isinstance(vocabulary, int) or not 0 < vocabulary <= 1 << 31:
        raise DataError(f"{where}: vocabulary {vocabulary!r} is not a number of tokens")
    dtype: np.dtype[Any] = DTYPES[name]
    for shard in index.shards:
        if shard.bytes != shard.samples * dtype.itemsize:
            raise DataError(f"{where}: {shard.file} has {shard.bytes} bytes for {shard.samples} tokens of {name}")
    return dtype
