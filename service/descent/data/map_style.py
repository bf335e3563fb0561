"""Any map-style PyTorch Dataset, as the data set protocol of Descent."""

from collections.abc import Sequence
from inspect import getattr_static
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from descent.data.base import Data, Indices, Pair, check_inside, digest_of
from descent.data.generators import own_generators, seed_generators
from descent.data.records import BadRecords
from descent.errors import DataError

_PROTOCOL = ("gather", "input_shape", "num_outputs", "name", "source", "digest")
_PROBES = 16  # samples that the digest of a user's data set looks at


def adapt(dataset: Any) -> Data:
    """The data set itself if it follows the protocol, else wrapped; DataError if neither goes."""
    # looked up without running properties: asking for `digest` would hash the whole data
    missing = object()
    if all(getattr_static(dataset, name, missing) is not missing for name in _PROTOCOL):
        return cast(Data, dataset)
    return MapStyle(dataset)


class MapStyle(Dataset[Pair]):
    """A user's Dataset of (input, target) pairs, with batches.

    Inputs and targets may be tensors, NumPy arrays or plain numbers; float64 becomes float32,
    the precision of parameters. A batch is read by the dataset's own `__getitems__` where it
    has one (PyTorch's convention for batched reading), else sample by sample.

    `num_outputs` comes from the dataset's `num_outputs`, `num_classes` or `len(classes)`; None
    without any of them. The digest covers 16 samples spread over the dataset, and leaves them
    out where reading twice differs (augmentation): then only the class and the length count.

    Where reading draws from torch's, NumPy's or Python's global generators (`random`, found by
    reading three samples), training seeds all three for each sample, so that augmentation
    depends on (seed, step, sample) and not on who reads what when.

    Raises DataError for anything that isn't map-style, is empty, or fails on a sample.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        kind = type(dataset)
        self.name: str = str(getattr(dataset, "name", kind.__name__))
        self.source: str = str(getattr(dataset, "source", f"{kind.__module__}.{kind.__qualname__}"))
        if not hasattr(kind, "__len__") or not hasattr(kind, "__getitem__"):
            raise DataError(
                f"{self.source} is not a map-style data set: it needs __len__ and __getitem__(i) -> (input, target)"
            )
        if len(dataset) == 0:
            raise DataError(f"{self.source}: no samples at all")
        self.num_outputs = _num_outputs(dataset)
        with own_generators() as drew:
            self.input_shape: tuple[int, ...] = tuple(self[0][0].shape)
            for index in {len(self) // 2, len(self) - 1}:
                self._read(index)
            self.random = bool(drew())
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Pair:
        # ours, not the user's, so that a plain for loop ends and an IndexError inside their
        # code isn't mistaken for the end
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        inputs, targets = self._collate([self._read(index % len(self))], [index])
        return inputs[0], targets[0]

    def gather(self, indices: Indices, seeds: Sequence[int] | None = None) -> Pair:
        """Inputs [n, *input_shape] and targets [n, ...]; DataError names a sample that fails.

        seeds: one per sample, for whatever its reading draws; the generators are given back
        as they were.
        """
        check_inside(indices, len(self))
        wanted = [int(index) for index in indices]
        if seeds is None:
            return self._collate(self._read_many(wanted), wanted)
        with own_generators():
            samples = self._read_each(wanted, seeds)
        return self._collate(samples, wanted)

    @property
    def digest(self) -> str:
        if self._digest is None:
            self._digest = self._look()
        return self._digest

    def _look(self) -> str:
        given = getattr(self.dataset, "digest", None)
        if isinstance(given, str):
            return given
        kind = type(self.dataset)
        identity = f"{kind.__module__}.{kind.__qualname__} {len(self)}"
        probes = np.linspace(0, len(self) - 1, min(len(self), _PROBES)).astype(np.int64)
        with own_generators():
            first, second = ([part for i in probes for part in self[int(i)]] for _ in range(2))
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        return digest_of(first if same else [], identity)

    def _read(self, index: int) -> tuple[Any, Any]:
        try:
            sample = self.dataset[index]
        except Exception as error:
            raise BadRecords([0], f"sample {index} of {self.source}: {type(error).__name__}: {error}") from error
        return self._pair(sample, index)

    def _read_each(self, indices: list[int], seeds: Sequence[int] | None = None) -> list[tuple[Any, Any]]:
        samples, bad = [], list[tuple[int, BadRecords]]()
        for row, index in enumerate(indices):
            if seeds is not None:
                seed_generators(seeds[row])
            try:
                samples.append(self._read(index))
            except BadRecords as error:
                bad.append((row, error))
        if bad:
            raise BadRecords([row for row, _ in bad], str(bad[0][1])) from bad[0][1].__cause__
        return samples

    def _read_many(self, indices: list[int]) -> list[tuple[Any, Any]]:
        if not hasattr(self.dataset, "__getitems__"):
            return self._read_each(indices)
        try:
            samples = list(self.dataset.__getitems__(indices))
        except Exception as error:
            self._read_each(indices)  # one by one, to tell which sample it was
            raise DataError(
                f"samples {indices[0]} … {indices[-1]} of {self.source}: __getitems__ failed with "
                f"{type(error).__name__}: {error}"
            ) from error
        if len(samples) != len(indices):
            raise DataError(f"{self.source}: __getitems__ gave {len(samples)} samples for {len(indices)} indices")
        return [self._pair(sample, i) for sample, i in zip(samples, indices, strict=True)]

    def _pair(self, sample: Any, index: int) -> tuple[Any, Any]:
        if not isinstance(sample, Sequence) or isinstance(sample, str) or len(sample) != 2:
            raise DataError(f"sample {index} of {self.source} is a {type(sample).__name__}, not a pair (input, target)")
        return sample[0], sample[1]

    def _collate(self, samples: list[tuple[Any, Any]], indices: list[int]) -> Pair:
        parts: list[Tensor] = []
        where = f"sample {indices[0]}" if len(indices) == 1 else f"samples {indices[0]} … {indices[-1]}"
        for part, values in zip(("input", "target"), zip(*samples, strict=True), strict=True):
            try:
                batch = default_collate(list(values))
            except (TypeError, RuntimeError) as error:
                raise DataError(
                    f"{part} of {where} of {self.source} can't be made a batch: {_first_line(error)}"
                ) from error
            if not isinstance(batch, Tensor):
                raise DataError(
                    f"{part} of {where} of {self.source} is of type "
                    f"{type(values[0]).__name__}: give a tensor, a NumPy array or a number"
                )
            parts.append(batch.float() if batch.dtype == torch.float64 else batch)
        return parts[0], parts[1]


def _num_outputs(dataset: Any) -> int | None:
    for attribute in ("num_outputs", "num_classes"):
        value = getattr(dataset, attribute, None)
        if isinstance(value, int):
            return value
    classes = getattr(dataset, "classes", None)
    return len(classes) if classes is not None else None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
