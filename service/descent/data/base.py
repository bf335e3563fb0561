"""What a data set is to Descent, data in memory, and seeded splits."""

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from descent.errors import DataError

Indices = npt.NDArray[np.int64]
Pair = tuple[Tensor, Tensor]

SPLITS = ("train", "evaluate", "all")
LARGE = 256 << 20
"""Bytes from which a file is mapped, and read in the background while a step computes."""
_CHUNK_BYTES = 16 << 20  # hashing goes piecewise, so that a memory-mapped array stays on disk


class Data(Protocol):
    """A data set that reads whole batches."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str:
        """Where it came from: a path, or a package."""
        ...

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change when the content does."""
        ...

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch dimension."""
        ...

    @property
    def num_outputs(self) -> int | None:
        """Classes, vocabulary size or regression values; None where it can't be known."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...

    def gather(self, indices: Indices) -> Pair:
        """Inputs [n, *input_shape] and targets [n, ...] of the samples, in the order asked."""
        ...


class TensorData(Dataset[Pair]):
    """Samples held as two tensors.

    inputs: [num_samples, *input_shape]; targets: [num_samples, ...].
    Raises DataError when the two disagree in length or hold nothing.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, *, num_outputs: int, name: str, source: str) -> None:
        if len(inputs) != len(targets):
            raise DataError(f"{name}: {len(inputs)} inputs but {len(targets)} targets ({source})")
        if len(inputs) == 0:
            raise DataError(f"{name}: no samples at all ({source})")
        self.inputs = inputs
        self.targets = targets
        self.num_outputs = num_outputs
        self.name = name
        self.source = source
        self.mapped = False
        """Whether the tensors are a file's, mapped: too large to be read while a step waits."""
        self._digest: str | None = None

    @property
    def in_memory(self) -> bool:
        """Whether a batch costs no reading."""
        return not self.mapped

    def tensors(self) -> Pair | None:
        """What is stored, all of it, in the form that `decode` takes."""
        return self.inputs, self.targets

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.inputs.shape[1:])

    @property
    def digest(self) -> str:
        if self._digest is None:
            self._digest = digest_of([self.inputs, self.targets], self.decoding())
        return self._digest

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Pair:
        inputs, targets = self.decode(self.inputs[index, None], self.targets[index, None])
        return inputs[0], targets[0]

    def gather(self, indices: Indices) -> Pair:
        """Inputs [n, *input_shape] and targets [n, ...]; raises IndexError outside the data."""
        at = torch.from_numpy(np.ascontiguousarray(indices, dtype=np.int64))
        return self.decode(self.inputs.index_select(0, at), self.targets.index_select(0, at))

    def decode(self, inputs: Tensor, targets: Tensor) -> Pair:
        """From what is stored to what a model takes, batch by batch; here nothing to do."""
        return inputs, targets

    def decoding(self) -> str:
        """Settings of `decode` that change the samples: they are part of the digest."""
        return ""


class PartOf(Dataset[Pair]):
    """What a part of a data set has in common with the whole."""

    data: Data

    @property
    def name(self) -> str:
        return self.data.name

    @property
    def source(self) -> str:
        return self.data.source

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.data.input_shape

    @property
    def num_outputs(self) -> int | None:
        return self.data.num_outputs


class Subset(PartOf):
    """A view on some samples of a data set, in the order of `indices`; nothing is copied."""

    def __init__(self, data: Data, indices: Indices) -> None:
        self.data = data
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

    def __getitem__(self, index: int) -> Pair:
        return self.data[int(self.indices[index])]

    def numbers(self, indices: Indices) -> Indices:
        """The samples' numbers in the data set that this is a view on."""
        return self.indices[indices]

    def gather(self, indices: Indices, **seeds: Any) -> Pair:
        return self.data.gather(self.indices[indices], **seeds)


def check_inside(indices: Indices, length: int) -> None:
    """IndexError unless each index is from 0 to length - 1."""
    if len(indices) and not (indices.min() >= 0 and indices.max() < length):
        raise IndexError(f"samples {indices.min()} to {indices.max()} of {length}")


def digest_of(tensors: Iterable[Tensor], *settings: str) -> str:
    """16 hexadecimal digits of the SHA-256 over type, shape and bytes of the tensors.

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


def held_count(length: int, share: float, key: str) -> int:
    """How many samples a share of `length` is. Raises DataError for a share that leaves one part empty."""
    if not 0.0 < share < 1.0:
        raise DataError(f"{key}={share}: give a share between 0 and 1, such as 0.1")
    count = int(length * share + 0.5)
    if 1 <= count < length:
        return count
    left = "evaluate" if count < 1 else "train"
    remedy = f"choose a share from {1 / max(1, length):.3g} to {1 - 1 / max(1, length):.3g}"
    if length < 2:
        remedy = "at least 2 samples are needed"
    raise DataError(f"{key}={share} of {length} samples leaves none to {left} on: {remedy}")


def split_indices(length: int, holdout: float, seed: int) -> tuple[Indices, Indices]:
    """Numbers of the samples to train on and of those to evaluate on, each ascending.

    A pure function: raw PCG64 output is the part of NumPy's random numbers that is promised to
    stay the same across versions and machines, hence the argsort instead of a shuffle.

    >>> train, evaluate = split_indices(10, 0.2, seed=0)
    >>> len(train), len(evaluate), sorted({*train.tolist(), *evaluate.tolist()}) == list(range(10))
    (8, 2, True)
    """
    num_held = held_count(length, holdout, "data.holdout")
    if seed < 0:
        raise DataError(f"seed={seed} of the split: give 0 or more")
    order = np.argsort(np.random.PCG64(seed).random_raw(length), kind="stable").astype(np.int64)
    return np.sort(order[num_held:]), np.sort(order[:num_held])


def check_split(name: str, chosen: str, allowed: tuple[str, ...] = SPLITS) -> None:
    """Refuse a `split` argument that a data set doesn't know."""
    if chosen not in allowed:
        raise DataError(f"{name}: split={chosen!r} is none of {', '.join(allowed)}")


def rows_of(length: int, chosen: str, holdout: float, seed: int) -> Indices:
    """Numbers of the samples in one split: 'train', 'evaluate' or 'all'."""
    check_split("data", chosen)
    if chosen == "all":
        return np.arange(length, dtype=np.int64)
    return split_indices(length, holdout, seed)[SPLITS.index(chosen)]


def standardized(
    values: npt.NDArray[np.float64], train: Indices
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """([n, columns] standardised, mean [columns], std [columns]) by the training rows' statistics.

    The population's standard deviation; a column that is constant in training is only centred.
    """
    mean = values[train].mean(axis=0)
    std = values[train].std(axis=0)
    # rounding leaves a constant column a spread of about 1e-16 of its size: not a spread to divide by
    std = np.where(std > 1e-12 * np.abs(mean), std, 1.0)
    return (values - mean) / std, mean, std
