"""A user's own data set, as the data set protocol of Descent."""

import hashlib
from collections.abc import Callable, Sequence
from inspect import getattr_static
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from descent.config.build import in_one_line
from descent.data.bad_records import BadRecords, Policy, read_good
from descent.data.base import BatchDataset, Data, Indices, Pair, View, check_indices, digest_of
from descent.data.batch import Batch, describe, map_tensors, tensors_of
from descent.data.data_thread import in_data_thread
from descent.data.generators import own_generators, seed_generators
from descent.errors import DataError, DescentError

Collate = Callable[[list[Any]], Batch]
"""Makes a batch of a list of samples."""
_PROTOCOL = ("gather", "input_shape", "num_outputs", "name", "source", "digest")
_PROBES = 16  # samples that are read to see whether reading draws random numbers, and for the digest
T = TypeVar("T")


def adapt(dataset: Any, on_error: Policy = "fail", collate: Collate | None = None) -> Data:
    """The data set itself if it is one of Descent's, else wrapped. Raises DataError for what can't be read.

    on_error: with "skip", samples that can't be read are passed over already here.
    collate: what makes a batch of a list of samples; None: torch's `default_collate`.
    """
    if isinstance(dataset, BatchDataset):
        return dataset if collate is None else Collated(dataset, collate)
    # Looked up without running properties: asking for `digest` might hash the whole data.
    missing = object()
    if all(getattr_static(dataset, name, missing) is not missing for name in _PROTOCOL):
        batches = OwnBatches(dataset)
        return batches if collate is None else Collated(batches, collate)
    return MapStyle(dataset, on_error, collate)


class UserData(BatchDataset):
    """What `MapStyle` and `OwnBatches` share: the user's object, and how it is called.

    The object is called in the process's data thread, unless its attribute `thread_safe` is true: then
    it is called in whichever thread asks, by `readers` threads at a time (an attribute too; 1 by default).
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        kind = type(dataset)
        self.thread_safe = getattr(dataset, "thread_safe", False) is True
        readers = getattr(dataset, "readers", 1)
        self.readers = readers if self.thread_safe and isinstance(readers, int) and readers > 0 else 1
        self.kind = f"{kind.__module__}.{kind.__qualname__}"
        names = self.call(getattr, dataset, "classes", None)
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        self.class_names = tuple(str(name) for name in names) if listed else None

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)`, in a thread in which the user's object may be used."""
        return function(*args) if self.thread_safe else in_data_thread(function, *args)


class OwnBatches(UserData):
    """A user's data set that reads whole batches by itself: it has `gather`, and the other members of `Data` as needed."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        self.name, self.source = str(dataset.name), str(dataset.source)
        self.input_shape, self.num_outputs = tuple(dataset.input_shape), dataset.num_outputs
        self.in_memory = getattr(dataset, "in_memory", False) is True
        self._length = self.call(len, dataset)

    @property
    def digest(self) -> str:
        return str(self.call(lambda: self.dataset.digest))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Pair:
        return self.call(lambda: self.dataset[index])

    def gather(self, indices: Indices) -> Pair:
        """Inputs and targets of the samples; an exception of the user's becomes a DataError."""
        try:
            return self.call(self.dataset.gather, indices)
        except DescentError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(f"{self.kind}.gather: {in_one_line(error)}") from error


class MapStyle(UserData):
    """A user's Dataset, read in batches.

    Most samples are pairs (input, target) of tensors, NumPy arrays or plain numbers. A sample may also be anything
    else that torch's `default_collate` takes, nested, or that `collate` makes a batch of. float64 becomes float32, the
    precision of parameters, unless the model's are float64 (see `keep_float64`). A batch is read by the data set's
    own `__getitems__` where there is one (PyTorch's convention for batched reading), else sample by sample.

    `num_outputs` comes from the data set's `num_outputs`, `num_classes` or `len(classes)`; None
    without any of them. The digest covers 16 samples spread over the data set.

    Where reading a sample draws from torch's, NumPy's or Python's global generators (found by reading
    16 samples), training seeds all three for each sample, so that augmentation depends on
    (seed, step, sample), and not on who reads what when. A collate function that draws (masks, mixup) is seeded
    for each batch.

    Raises DataError for an object that isn't map-style or is empty, and for a sample that can't be read.
    """

    def __init__(self, dataset: Any, on_error: Policy = "fail", collate: Collate | None = None) -> None:
        super().__init__(dataset)
        self.own_collate, self.keeps_float64 = collate, False
        self.name = str(getattr(dataset, "name", type(dataset).__name__))
        self.source = str(getattr(dataset, "source", self.kind))
        if not hasattr(type(dataset), "__len__") or not hasattr(type(dataset), "__getitem__"):
            raise DataError(f"{self.source} is not a map-style data set: it needs __len__ and __getitem__(i)")
        self._length = self.call(self._count)
        if self._length == 0:
            raise DataError(f"{self.source}: no samples at all")
        self.num_outputs = _num_outputs(dataset)
        self._digest: str | None = None
        self.input_shape, self.draws_random_numbers = self.call(self._probe, on_error)

    def _count(self) -> int:
        try:
            return len(self.dataset)
        except (Exception, SystemExit) as error:
            raise DataError(f"{self.source}: len() failed with {in_one_line(error)}") from error

    def _probe(self, on_error: Policy) -> tuple[tuple[int, ...] | None, bool]:
        """(shape of an input of a pair, whether reading or collating draws random numbers)."""
        self.pairs = False
        first: Any = None
        with own_generators() as drew:
            for index in self._probes():
                try:
                    sample = self._read(index)
                    first = sample if first is None else first
                except BadRecords:
                    if on_error == "fail" and index == 0:
                        raise
            self.pairs = self.own_collate is None and _is_pair(first)
            random = bool(drew()) or getattr(self.dataset, "draws_random_numbers", False) is True
            batch, _ = read_good(self._gather_one_by_one, np.zeros(1, dtype=np.int64), self._length, on_error)
            random = random or (self.own_collate is not None and bool(drew()))
        return (tuple(batch[0].shape[1:]) if self.pairs else None), random

    def keep_float64(self) -> None:
        """From now on float64 stays float64: the model computes in double precision."""
        self.keeps_float64 = True

    def _gather_one_by_one(self, indices: Indices) -> Batch:
        wanted = [int(index) for index in indices]
        return self._collate(self._read_each(wanted), wanted)

    def _probes(self) -> list[int]:
        return sorted({int(i) for i in np.linspace(0, self._length - 1, min(self._length, _PROBES))})

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        # Checked here, so that a plain for loop ends, and an IndexError inside the user's code isn't taken for the end.
        if not -self._length <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        if not self.pairs:
            return self.call(self._read, index % self._length)
        inputs, targets = self.gather(np.array([index % self._length], dtype=np.int64))
        return inputs[0], targets[0]

    def gather(self, indices: Indices) -> Batch:
        """The samples as a batch; BadRecords names the first sample that fails."""
        check_indices(indices, self._length)
        wanted = [int(index) for index in indices]
        return self._collate(self.call(self._read_many, wanted), wanted)

    def gather_seeded(self, indices: Indices, seeds: Sequence[int]) -> Batch:
        """`gather`, with the generators seeded before each sample, and once more before a collate function of the user's.

        The generators' states are put back afterwards.
        """
        check_indices(indices, self._length)
        wanted = [int(index) for index in indices]
        samples = self.call(self._read_each, wanted, seeds)
        if self.own_collate is None:
            return self._collate(samples, wanted)
        with own_generators(seed=seed_of_batch(seeds)):
            return self._collate(samples, wanted)

    @property
    def digest(self) -> str:
        if self._digest is None:
            self._digest = self.call(self._make_digest)
        return self._digest

    def _make_digest(self) -> str:
        given = getattr(self.dataset, "digest", None)
        if isinstance(given, str):
            return given
        parts: list[Tensor] = []
        for index in self._probes():
            try:
                batch = self.gather_seeded(np.array([index], dtype=np.int64), [index])
                parts += [tensor for _, tensor in tensors_of(batch)]
            except BadRecords:
                parts.append(torch.tensor([index]))
        return digest_of(parts, f"{self.kind} {self._length} {self.class_names}")

    # -- in the data thread ---------------------------------------------------------------

    def _read(self, index: int) -> Any:
        try:
            sample = self.dataset[index]
        except (Exception, SystemExit) as error:
            raise BadRecords(f"sample {index} of {self.source}: {in_one_line(error)}") from error
        return self._pair(sample, index) if self.pairs else sample

    def _read_each(self, indices: list[int], seeds: Sequence[int] | None = None) -> list[Any]:
        if seeds is not None:
            with own_generators():
                return self._read_all(indices, lambda row: seed_generators(seeds[row]))
        return self._read_all(indices, lambda _: None)

    def _read_all(self, indices: list[int], before: Callable[[int], None]) -> list[Any]:
        samples, bad = [], list[tuple[int, BadRecords]]()
        for row, index in enumerate(indices):
            before(row)
            try:
                samples.append(self._read(index))
            except BadRecords as error:
                bad.append((row, error))
        if bad:
            raise BadRecords(str(bad[0][1]), [row for row, _ in bad]) from bad[0][1].__cause__
        return samples

    def _read_many(self, indices: list[int]) -> list[Any]:
        if not hasattr(self.dataset, "__getitems__"):
            return self._read_each(indices)
        try:
            samples = list(self.dataset.__getitems__(indices))
        except (Exception, SystemExit) as error:
            self._read_each(indices)  # one by one, to find out which sample fails
            raise DataError(
                f"samples {indices[0]} … {indices[-1]} of {self.source}: __getitems__ failed with {in_one_line(error)}"
            ) from error
        if len(samples) != len(indices):
            raise DataError(f"{self.source}: __getitems__ gave {len(samples)} samples for {len(indices)} indices")
        return [self._pair(sample, i) for sample, i in zip(samples, indices, strict=True)] if self.pairs else samples

    def _pair(self, sample: Any, index: int) -> tuple[Any, Any]:
        if not isinstance(sample, Sequence) or isinstance(sample, str) or len(sample) != 2:
            raise BadRecords(
                f"sample {index} of {self.source} is {describe(sample)}, not a pair (input, target) as the first one"
            )
        return sample[0], sample[1]

    # -- in any thread ----------------------------------------------------------------------

    def _collate(self, samples: list[Any], indices: list[int]) -> Batch:
        return self._collate_pairs(samples, indices) if self.pairs else self._collate_any(samples, indices)

    def _collate_any(self, samples: list[Any], indices: list[int]) -> Batch:
        try:
            batch = (self.own_collate or default_collate)(samples)
        except BadRecords:
            raise
        except Exception as error:
            where = f"sample {indices[0]}" if len(indices) == 1 else f"samples {indices[0]} … {indices[-1]}"
            if self.own_collate is not None:
                raise DataError(
                    f"{where} of {self.source}: the collate function failed: {in_one_line(error)}"
                ) from error
            raise DataError(
                f"{where} of {self.source}, such as {describe(samples[0])}, can't be made a batch: {_first_line(error)}; "
                "say how, by data.collate._target_=my_module.collate, a function from a list of samples to a batch"
            ) from error
        return map_tensors(lambda t: self._as_float32(t, "a value", indices) if t.dtype == torch.float64 else t, batch)

    def _collate_pairs(self, samples: list[Any], indices: list[int]) -> Pair:
        parts: list[Tensor] = []
        where = f"sample {indices[0]}" if len(indices) == 1 else f"samples {indices[0]} … {indices[-1]}"
        for part, values in zip(("input", "target"), zip(*samples, strict=True), strict=True):
            try:
                batch = default_collate(list(values))
            except (TypeError, RuntimeError) as error:
                raise DataError(
                    f"{part} of {where} of {self.source} can't be made a batch: {_first_line(error)}; say how, by "
                    "data.collate._target_=my_module.collate, a function from a list of samples to a batch"
                ) from error
            if not isinstance(batch, Tensor):
                raise DataError(
                    f"{part} of {where} of {self.source} is of type "
                    f"{type(values[0]).__name__}: give a tensor, a NumPy array or a number"
                )
            parts.append(self._as_float32(batch, part, indices) if batch.dtype == torch.float64 else batch)
        return parts[0], parts[1]

    def _as_float32(self, batch: Tensor, part: str, indices: list[int]) -> Tensor:
        if self.keeps_float64:
            return batch
        single = batch.float()
        beyond = single.isinf() & batch.isfinite()
        if bool(beyond.any()) and len(batch) != len(indices):
            raise BadRecords(f"samples {indices[0]} … {indices[-1]} of {self.source}: hold a number beyond float32")
        if bool(beyond.any()):
            rows = beyond.reshape(len(batch), -1).any(1).nonzero()[:, 0].tolist()
            raise BadRecords(
                f"{part} of sample {indices[rows[0]]} of {self.source}: holds a number beyond float32", rows
            )
        return single


class Collated(View):
    """A data set that reads its own batches, with a collate function for its samples, each a pair (input, target)."""

    def __init__(self, data: Data, collate: Collate) -> None:
        super().__init__(data)
        self._collate = collate
        self.input_shape = None
        with own_generators() as drew:
            self.gather(np.zeros(1, dtype=np.int64))
            self.draws_random_numbers = data.draws_random_numbers or bool(drew())

    @property
    def digest(self) -> str:
        return self.data.digest

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Batch:
        return self.data[index]

    def parent_indices(self, indices: Indices) -> Indices:
        return indices

    def gather(self, indices: Indices) -> Batch:
        return self._batch_of(self.data.gather(indices))

    def gather_seeded(self, indices: Indices, seeds: Sequence[int]) -> Batch:
        batch = self.data.gather_seeded(indices, seeds) if self.data.draws_random_numbers else self.data.gather(indices)
        with own_generators(seed=seed_of_batch(seeds)):
            return self._batch_of(batch)

    def _batch_of(self, batch: Batch) -> Batch:
        inputs, targets = batch
        try:
            return self._collate(list(zip(inputs, targets, strict=True)))
        except Exception as error:
            raise DataError(f"{self.source}: the collate function failed: {in_one_line(error)}") from error


def is_collated(data: Data) -> bool:
    """Whether a collate function stands between the data set as it is stored and its batches."""
    while isinstance(data, View):
        if isinstance(data, Collated):
            return True
        data = data.data
    return False


def seed_of_batch(seeds: Sequence[int]) -> int:
    """The seed of a batch's own draws, from those of its samples: the same whoever makes the batch.

    >>> seed_of_batch([3, 4]) == seed_of_batch([4, 3])
    False
    """
    content = b"".join(seed.to_bytes(16, "little", signed=True) for seed in seeds)
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1


def _is_pair(sample: Any) -> bool:
    """Whether a sample is (input, target), each a tensor, an array or a number."""
    plain = Tensor | np.ndarray | np.generic | int | float
    return (
        isinstance(sample, tuple | list)
        and not hasattr(sample, "_fields")
        and len(sample) == 2
        and all(isinstance(part, plain) for part in sample)
    )


def _num_outputs(dataset: Any) -> int | None:
    for attribute in ("num_outputs", "num_classes"):
        value = getattr(dataset, attribute, None)
        if isinstance(value, int):
            return value
    classes = getattr(dataset, "classes", None)
    return len(classes) if classes is not None else None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
