"""Which samples an epoch has, where that is not each of them once: `data.sampler`.

A sampler is a pure function: the sample at a position of an epoch depends on (seed, epoch, position) alone. So
the order is the same for any number of workers, and a run goes on in the middle of an epoch without a replay.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from descent.config.build import in_one_line
from descent.data.base import Data, indices_in_root, root_of
from descent.data.batch import Array, Indices
from descent.data.map_style import UserData
from descent.errors import ConfigError
from descent.training.input.permutation import permute, stream_seed

_POINTS = float(1 << 53)


class EpochOrder(Protocol):
    """The samples of an epoch by position; an epoch has as many positions as the training set has samples."""

    def samples(self, positions: Indices, key: int, epoch: int) -> Indices:
        """The sample numbers at these positions. key: the epoch's own seed, which follows from the run's."""
        ...


class Sampler(Protocol):
    """What `data.sampler` names."""

    def bind(self, data: Data, batch_size: int) -> EpochOrder:
        """The order for this training set. Raises ConfigError."""
        ...


class Sequential:
    """The samples in the order in which they are stored, in every epoch."""

    def bind(self, data: Data, batch_size: int) -> EpochOrder:  # noqa: ARG002
        return self

    def samples(self, positions: Indices, key: int, epoch: int) -> Indices:  # noqa: ARG002
        return positions


class Weighted:
    """Each position of an epoch draws a sample, with replacement: sample i with a chance in proportion to weights[i].

    weights: a list, a `.npy` file, or None for the data set's attribute `weights`; one for each sample of the data set
    as it is stored, or of its training part.
    """

    def __init__(self, weights: list[float] | str | None = None) -> None:
        self.weights = weights

    def bind(self, data: Data, batch_size: int) -> EpochOrder:  # noqa: ARG002
        weights = _of_each_sample(self.weights, "weights", data)
        if not weights.any():
            raise ConfigError("data.sampler.weights: all are 0, so there is no sample to draw")
        return _Drawn(weights)


class ClassBalanced:
    """Each position of an epoch draws a class, all with the same chance, and then a sample of this class.

    The classes are the data set's labels, where all of them are at hand, or its attribute `labels` or `targets`.
    """

    def bind(self, data: Data, batch_size: int) -> EpochOrder:  # noqa: ARG002
        labels = _labels(data)
        _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
        return _Drawn(1.0 / counts[numbers])


class ByLength:
    """Samples of similar length come into one batch, so that little of a batch is padding.

    The samples of an epoch are shuffled; those of each window of `window` batches are sorted by length; and the
    batches of a window are shuffled, as Hugging Face's `group_by_length` does it.

    lengths: a list, a `.npy` file, or None for the data set's attribute `lengths`.
    """

    def __init__(self, lengths: list[float] | str | None = None, window: int = 50) -> None:
        if window < 1:
            raise ConfigError(f"data.sampler.window={window}: must be a number of batches, 1 or more")
        self.lengths, self.window = lengths, window

    def bind(self, data: Data, batch_size: int) -> EpochOrder:
        return _Grouped(_of_each_sample(self.lengths, "lengths", data), batch_size, self.window)


SHORT_NAMES = {"sequential": Sequential, "class_balanced": ClassBalanced, "by_length": ByLength, "weighted": Weighted}
"""What `data.sampler` may be instead of a `_target_`."""


def bound(sampler: Any, data: Data, batch_size: int, seed: int, where: str) -> EpochOrder:
    """The order that a sampler, or a function (epoch, seed, num_samples) -> sample numbers, gives. Raises ConfigError."""
    if data.layout is not None:
        raise ConfigError(
            f"{where}: {data.name} is read shard by shard, in an order of its own; leave data.sampler out"
        )
    if hasattr(sampler, "bind"):
        order: EpochOrder = sampler.bind(data, batch_size)
        return order
    if not callable(sampler):
        raise ConfigError(
            f"{where}: is a {type(sampler).__name__}; a sampler is a function (epoch, seed, num_samples) -> sample numbers"
        )
    own = _Own(sampler, len(data), where)
    key = stream_seed(seed, 0)
    if not np.array_equal(own.epoch(0, key), _Own(sampler, len(data), where).epoch(0, key)):
        raise ConfigError(
            f"{where}: gives another order when it is called again with the same epoch and seed; draw from a generator that "
            "it seeds with them: numpy.random.default_rng([seed, epoch])"
        )
    return own


class _Drawn:
    """Draws with replacement."""

    def __init__(self, weights: Array) -> None:
        self._ends = np.cumsum(weights / weights.sum())
        self._last = int(np.flatnonzero(weights)[-1])  # a point that rounding puts behind the last end is this sample's

    def samples(self, positions: Indices, key: int, epoch: int) -> Indices:  # noqa: ARG002
        drawn = np.searchsorted(self._ends, _hashed(positions, key) / _POINTS, side="right")
        return np.minimum(drawn, self._last).astype(np.int64)


class _Grouped:
    """Sorted by length within windows of several batches."""

    def __init__(self, lengths: Array, batch_size: int, window: int) -> None:
        self._lengths, self._batch, self._width = lengths, batch_size, batch_size * window

    def samples(self, positions: Indices, key: int, epoch: int) -> Indices:  # noqa: ARG002
        numbers = positions // self._width
        found = np.empty(len(positions), np.int64)
        for number in np.unique(numbers).tolist():
            inside = numbers == number
            found[inside] = self._window(number, key)[positions[inside] - number * self._width]
        return found

    def _window(self, number: int, key: int) -> Indices:
        n = len(self._lengths)
        lo, hi = number * self._width, min((number + 1) * self._width, n)
        samples = permute(np.arange(lo, hi), n, key)
        samples = samples[np.argsort(-self._lengths[samples], kind="stable")]
        full = len(samples) // self._batch
        order = permute(np.arange(full), full, stream_seed(key, 1, number)) if full else np.arange(0)
        batches = samples[: full * self._batch].reshape(full, self._batch)[order]
        return np.concatenate([batches.reshape(-1), samples[full * self._batch :]])


class _Own:
    """A user's function (epoch, seed, num_samples) -> sample numbers, called once an epoch."""

    def __init__(self, function: Callable[[int, int, int], Any], num_samples: int, where: str) -> None:
        self._function, self._num_samples, self._where = function, num_samples, where
        self._epochs: dict[int, Indices] = {}

    def samples(self, positions: Indices, key: int, epoch: int) -> Indices:
        return self.epoch(epoch, key)[positions]

    def epoch(self, epoch: int, key: int) -> Indices:
        """The whole epoch; the last two are kept."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = self._asked(epoch, key)
        return self._epochs[epoch]

    def _asked(self, epoch: int, key: int) -> Indices:
        n = self._num_samples
        try:
            found = np.asarray(self._function(epoch, key, n))
        except Exception as error:
            raise ConfigError(f"{self._where}: failed for epoch {epoch}: {in_one_line(error)}") from error
        if found.shape != (n,) or not np.issubdtype(found.dtype, np.integer):
            raise ConfigError(
                f"{self._where}: gives {found.dtype} {list(found.shape)} for epoch {epoch}; it must give one sample number "
                f"for each of the {n} positions of an epoch (repeat some, leave others out)"
            )
        if n and not (found.min() >= 0 and found.max() < n):
            raise ConfigError(
                f"{self._where}: gives the samples {found.min()} to {found.max()} of {n} for epoch {epoch}"
            )
        return found.astype(np.int64)


def _hashed(positions: Indices, key: int) -> Array:
    """A whole number below 2^53 for each position, which looks random (splitmix64; Steele et al. 2014)."""
    x = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: Array = (x ^ (x >> np.uint64(31))) >> np.uint64(11)
    return found


def _of_each_sample(given: Any, name: str, data: Data) -> Array:
    """The numbers `given`, one for each sample of `data`. Raises ConfigError."""
    where = f"data.sampler.{name}"
    if given is None:
        given = _attribute(data, (name,))
        if given is None:
            raise ConfigError(f"{where}: the data set has no attribute {name}; give a list, or a .npy file")
    if isinstance(given, str):
        try:
            given = np.load(Path(given).expanduser(), allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{where}={given}: {in_one_line(error)}; it must be a file that numpy.save has written"
            ) from error
    try:
        numbers = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: must be numbers: {error}") from error
    numbers = _of_part(numbers, data, where)
    bad = np.flatnonzero(~(np.isfinite(numbers) & (numbers >= 0)))
    if len(bad):
        raise ConfigError(f"{where}: sample {bad[0]} has {numbers[bad[0]]:g}; it must be 0 or more, and finite")
    return numbers


def _of_part(numbers: Array, data: Data, where: str) -> Array:
    """One number for each sample of `data`, of numbers for these or for all samples as they are stored."""
    whole = len(root_of(data))
    if numbers.ndim == 1 and len(numbers) == whole:
        return numbers[indices_in_root(data, np.arange(len(data), dtype=np.int64))]
    if numbers.shape != (len(data),):
        raise ConfigError(
            f"{where}: has the shape {list(numbers.shape)}; it must have one number for each of the {whole} samples"
            + (f", or of the {len(data)} that are trained on" if whole != len(data) else "")
        )
    return numbers


def _labels(data: Data) -> Array:
    stored = root_of(data).labels
    given = _attribute(data, ("labels", "targets")) if stored is None else stored.numpy()
    if given is None:
        raise ConfigError(
            "data.sampler=class_balanced: the labels of this data set are not at hand without reading every sample; give "
            "the data set an attribute `labels`, or use data.sampler._target_=…Weighted with weights"
        )
    return _of_part(np.asarray(given).reshape(len(given), -1)[:, 0], data, "data.sampler=class_balanced: labels")


def _attribute(data: Data, names: tuple[str, ...]) -> Any:
    """The first of these attributes that the user's data set has."""
    root = root_of(data)
    if not isinstance(root, UserData):
        return None
    found = (root.call(inspect.getattr_static, root.dataset, name, None) for name in names)
    if all(value is None for value in found):
        return None
    return next((v for name in names if (v := root.call(getattr, root.dataset, name, None)) is not None), None)
