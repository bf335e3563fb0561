"""The protocol of a data set, its defaults, data in memory, and views on a part of a data set."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from descent.data.bad_records import KnownBad
from descent.data.batch import Batch as Batch
from descent.data.batch import Indices as Indices
from descent.data.batch import Pair as Pair
from descent.data.layout import Layout
from descent.data.preprocessing import Preprocessing
from descent.errors import DataError

LARGE = 256 << 20
"""Files above this many bytes are memory-mapped, and read in the background while a step computes."""
_STRETCHES, _STRETCH_BYTES = 64, 1 << 20
_CHUNK_BYTES = 16 << 20  # a digest reads in pieces, so that a memory-mapped array stays on disk


class Data(Protocol):
    """A data set that reads whole batches.

    `BatchDataset` gives every member below `__len__` a default; a data set overrides those that
    apply to it.
    """

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str:
        """Where the data came from: a path, or a package."""
        ...

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change when the content, or what is made of it, changes.

        Of files too large to be read for this, a part of the content counts.
        """
        ...

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Shape of one input, without the batch dimension; None where samples are no pairs (input, target)."""
        ...

    @property
    def num_outputs(self) -> int | None:
        """Number of classes, vocabulary size or number of regression values; None where the data doesn't say."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...

    def gather(self, indices: Indices) -> Batch:
        """The samples as a batch, in the order of `indices`: mostly inputs [n, *input_shape] and targets [n, ...]."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The name of each class, by its number; None where the data has no names or no classes."""
        ...

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What was done to the source's inputs, for the model to take with it; None where they are used as they are."""
        ...

    @property
    def layout(self) -> Layout | None:
        """How the samples lie in shards, where the order should go shard by shard; else None."""
        ...

    @property
    def in_memory(self) -> bool:
        """Whether `gather` only copies memory, so that reading ahead in the background gains nothing."""
        ...

    @property
    def labels(self) -> Tensor | None:
        """Every target, [num_samples, ...], where all of them are at hand without reading samples; else None."""
        ...

    @property
    def draws_random_numbers(self) -> bool:
        """Whether reading a sample draws from torch's, NumPy's or Python's generator (augmentation)."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The local files that samples are read from while a run trains; none where all is in memory."""
        ...

    @property
    def readers(self) -> int:
        """How many batches are worth reading at the same time."""
        ...

    def gather_seeded(self, indices: Indices, seeds: Sequence[int]) -> Batch:
        """`gather`, with the three generators seeded by `seeds[i]` before sample `indices[i]` is read."""
        ...

    def prefetch(self, shards: Indices) -> None:
        """Fetch these shards of the layout in the background, in this order: they are needed soon."""
        ...

    def refuse_known_bad(self, indices: Indices) -> None:
        """Raise BadRecords where some of these samples are known to be unusable, without reading them."""
        ...

    def stored(self) -> Pair | None:
        """All inputs and targets in the form that `decode` takes, where they are in memory; else None."""
        ...

    def decode(self, inputs: Tensor, targets: Tensor) -> Pair:
        """A batch as a model takes it, from a batch as it is stored, on whichever device that is."""
        ...


class BatchDataset(Dataset[Batch]):
    """The optional members of `Data`, with what holds for a data set that doesn't say otherwise.

    A subclass sets name, source, input_shape and num_outputs, and defines digest, `__len__`,
    `__getitem__` and `gather`.
    """

    name: str
    source: str
    input_shape: tuple[int, ...] | None
    num_outputs: int | None
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    layout: Layout | None = None
    in_memory: bool = False
    labels: Tensor | None = None
    draws_random_numbers: bool = False
    readers: int = 1
    files: tuple[Path, ...] = ()

    @property
    def digest(self) -> str:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def gather(self, indices: Indices) -> Batch:
        raise NotImplementedError

    def gather_seeded(self, indices: Indices, seeds: Sequence[int]) -> Batch:  # noqa: ARG002
        return self.gather(indices)

    def prefetch(self, shards: Indices) -> None:
        """Nothing to fetch."""

    def refuse_known_bad(self, indices: Indices) -> None:
        """Nothing is known to be bad."""

    def stored(self) -> Pair | None:
        return None

    def decode(self, inputs: Tensor, targets: Tensor) -> Pair:
        return inputs, targets


class TensorData(BatchDataset):
    """Samples held as two tensors.

    inputs: [num_samples, *input_shape]; targets: [num_samples, ...].
    mapped: the files that the tensors are memory-mapped from, where they are too large to be read while a step waits.
    bad: the samples that can't be used, which raise BadRecords when they are read.
    A subclass that keeps its samples smaller than a model takes them (bytes instead of floats)
    overrides `decode`, and `decode_settings` where the result depends on settings.
    Raises DataError when the two tensors disagree in length or are empty.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        num_outputs: int,
        name: str,
        source: str,
        class_names: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        mapped: Sequence[Path] = (),
        bad: KnownBad | None = None,
    ) -> None:
        if len(inputs) != len(targets):
            raise DataError(f"{name}: {len(inputs)} inputs but {len(targets)} targets ({source})")
        if len(inputs) == 0:
            raise DataError(f"{name}: no samples at all ({source})")
        self.inputs = inputs
        self.targets = targets
        self.input_shape = tuple(inputs.shape[1:])
        self.num_outputs = num_outputs
        self.name = name
        self.source = source
        self.class_names = tuple(class_names) if class_names else None
        self.preprocessing = preprocessing
        self.in_memory, self.files = not mapped, tuple(mapped)
        self.labels = targets
        self._bad = bad
        self._digest: str | None = None

    def refuse_known_bad(self, indices: Indices) -> None:
        if self._bad is not None:
            self._bad.refuse(indices)

    def stored(self) -> Pair | None:
        return self.inputs, self.targets

    @property
    def digest(self) -> str:
        if self._digest is None:
            tensors = [self.inputs, self.targets]
            settings = [self.decode_settings()] if self.in_memory else [self.decode_settings(), str(len(self))]
            self._digest = digest_of(tensors if self.in_memory else map(_spread, tensors), *settings)
        return self._digest

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Pair:
        self.refuse_known_bad(np.array([index]))
        inputs, targets = self.decode(self.inputs[index, None], self.targets[index, None])
        return inputs[0], targets[0]

    def gather(self, indices: Indices) -> Pair:
        """Inputs [n, *input_shape] and targets [n, ...]; raises IndexError outside the data, BadRecords for bad samples."""
        self.refuse_known_bad(indices)
        at = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        return self.decode(self.inputs.index_select(0, at), self.targets.index_select(0, at))

    def decode_settings(self) -> str:
        """The settings of `decode` that change the samples: they are part of the digest."""
        return ""


class View(BatchDataset):
    """Some samples of another data set; nothing is copied.

    data: the data set that the view shows a part of, perhaps a view itself.
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self.name, self.source = data.name, data.source
        self.input_shape, self.num_outputs = data.input_shape, data.num_outputs
        self.class_names, self.preprocessing = data.class_names, data.preprocessing
        self.in_memory, self.readers, self.files = data.in_memory, data.readers, data.files
        self.draws_random_numbers = data.draws_random_numbers

    def parent_indices(self, indices: Indices) -> Indices:
        """The numbers of these samples in the data set that the view is on."""
        raise NotImplementedError

    def gather(self, indices: Indices) -> Batch:
        return self.data.gather(self.parent_indices(indices))

    def gather_seeded(self, indices: Indices, seeds: Sequence[int]) -> Batch:
        return self.data.gather_seeded(self.parent_indices(indices), seeds)

    def prefetch(self, shards: Indices) -> None:
        self.data.prefetch(shards)


class Subset(View):
    """The samples `indices` of a data set, in this order. Raises DataError for an index outside the data."""

    def __init__(self, data: Data, indices: Indices) -> None:
        super().__init__(data)
        self.indices: Indices = np.ascontiguousarray(indices, dtype=np.int64)
        if len(self.indices) and not (self.indices.min() >= 0 and self.indices.max() < len(data)):
            raise DataError(
                f"{data.name}: subset indices {self.indices.min()} to {self.indices.max()} "
                f"don't lie within its {len(data)} samples"
            )

    @property
    def digest(self) -> str:
        return digest_of([torch.from_numpy(self.indices)], self.data.digest)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Batch:
        return self.data[int(self.indices[index])]

    def parent_indices(self, indices: Indices) -> Indices:
        return self.indices[indices]


def root_of(data: Data) -> Data:
    """The data set beneath the views."""
    while isinstance(data, View):
        data = data.data
    return data


def indices_in_root(data: Data, indices: Indices) -> Indices:
    """The numbers of a view's samples in `root_of(data)`."""
    while isinstance(data, View):
        indices, data = data.parent_indices(indices), data.data
    return indices


def check_indices(indices: Indices, length: int) -> None:
    """Raise IndexError unless each index is from 0 to length - 1."""
    if len(indices) and not (indices.min() >= 0 and indices.max() < length):
        raise IndexError(f"samples {indices.min()} to {indices.max()} of {length}")


def _spread(tensor: Tensor) -> Tensor:
    """64 evenly spaced stretches of a tensor, of a megabyte each: a large mapped file isn't read whole."""
    rows = max(1, _STRETCH_BYTES * len(tensor) // max(1, tensor.numel() * tensor.element_size()))
    starts = np.linspace(0, max(0, len(tensor) - rows), min(_STRETCHES, len(tensor))).astype(np.int64)
    return torch.cat([tensor[start : start + rows] for start in starts.tolist()])


def digest_of(tensors: Iterable[Tensor], *settings: str) -> str:
    """16 hexadecimal digits of the SHA-256 over `settings` and the type, shape and bytes of the tensors.

    >>> digest_of([torch.arange(4)]) == digest_of([torch.arange(4).view(2, 2)])
    False
    """
    content = hashlib.sha256("\0".join(settings).encode())
    for tensor in tensors:
        content.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel() == 0:
            continue
        rows = tensor if tensor.dim() else tensor.view(1)
        step = max(1, _CHUNK_BYTES * len(rows) // (rows.numel() * rows.element_size()))
        for piece in rows.split(step):
            content.update(piece.contiguous().view(-1).view(torch.uint8).numpy())
    return content.hexdigest()[:16]
