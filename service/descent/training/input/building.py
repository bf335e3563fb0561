"""The data sets of a config: built, split, and checked to come out the same however often they are built."""

import inspect
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from descent.config import RunConfig, build, resolve_target
from descent.data.bad_records import BadRecords
from descent.data.base import BatchDataset, Data, Indices, Pair, root_of
from descent.data.cache import use_cache
from descent.data.data_thread import in_data_thread
from descent.data.generators import own_generators
from descent.data.identity import require_digest
from descent.data.map_style import UserData, adapt
from descent.data.splits import split
from descent.errors import ConfigError, DataError
from descent.training.input.sampling import stream_seed

_COMPARED, _COMPARED_AT_LEAST = 64, 4  # samples that are read twice
_COMPARE_S = 3.0
_DEFAULT_HOLDOUT = 0.1


def build_data(config: RunConfig, digest: str | None = None, collate: Any = None) -> tuple[Data, Data | None]:  # noqa: ARG001
    """The training set and the evaluation set (None without one).

    digest: what `digest_to_compare` gave for the training set when the run began.
    Raises ConfigError or DataError.
    """
    train, evaluate = _build_both(config)
    require_digest(train, digest, "data.train")
    return train, evaluate


def digest_to_compare(train: Data) -> str | None:
    """The digest with which each worker compares its training set; None for a user's class.

    A user's class is built twice before the run instead: its digest reads samples, which may take long.
    """
    return None if isinstance(root_of(train), UserData) else train.digest


def _build_both(config: RunConfig) -> tuple[Data, Data | None]:
    use_cache(config.data.cache.dir, config.data.cache.gb)
    if config.data.evaluate is None:
        train = _data_set(config, config.data.train, "data.train")
        return split(train, config.data.holdout, config.data.test, config.seed)[:2]
    _refuse_unused_shares(config)
    train = _data_set(config, config.data.train, "data.train")
    return train, _data_set(config, config.data.evaluate, "data.evaluate")


def _refuse_unused_shares(config: RunConfig) -> None:
    """Raise ConfigError for shares that were set and that nothing follows, since the data has an evaluation set."""
    name, evaluate = config.data.name, config.data.evaluate or {}
    cure = "leave it out, or let Descent split the data: data.evaluate=null"
    if "split" in config.data.train:
        cure += " and data.train.split=all"
    if config.data.test:
        raise ConfigError(
            f"data.test={config.data.test:g}: {name} has an evaluation set of its own, so no test part is split off; {cure}"
        )
    if config.data.holdout != _DEFAULT_HOLDOUT and "holdout" not in {**config.data.train, **evaluate}:
        raise ConfigError(
            f"data.holdout={config.data.holdout:g}: {name} has an evaluation set of its own, so nothing is held out; {cure}"
        )


def _data_set(config: RunConfig, spec: Mapping[str, Any], where: str) -> Data:
    """The data set of a spec, built in the thread in which it will be read."""
    data = in_data_thread(_build, config, spec, where)
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise ConfigError(
            f"{where}: {type(data).__name__} has no __len__ and __getitem__, so it is not a map-style Dataset"
        )
    adapted = adapt(data, config.data.on_error)
    if len(adapted) == 0:
        raise DataError(f"{where}: {config.data.name} has no samples")
    return adapted


def _build(config: RunConfig, spec: Mapping[str, Any], where: str) -> Any:
    # What a class draws while it is built (a shuffle, a split) depends on the run's seed alone. The training and
    # the evaluation set get the same draws, so that a class that splits by itself makes disjoint parts.
    with own_generators(seed=config.seed):
        target = resolve_target(spec["_target_"], config.trusted_modules, f"{where}._target_")
        follows = inspect.isclass(target) and issubclass(target, BatchDataset) and "on_error" not in spec
        takes_policy = follows and "on_error" in inspect.signature(target).parameters
        return build(
            spec, config.trusted_modules, where, **({"on_error": config.data.on_error} if takes_policy else {})
        )


# -- whether it comes out the same ------------------------------------------------------


def refuse_unrepeatable(config: RunConfig, train: Data, evaluate: Data | None) -> None:
    """Build a user's data sets once more, and raise DataError where the second one differs from the first.

    Each process of a run builds its own, and so does a run that repeats this one or goes on with it. The
    second one is read backwards: what a sample is must not depend on what was read before.
    """
    specs = [("data.train", config.data.train, train)]
    if config.data.evaluate is not None and evaluate is not None:
        specs.append(("data.evaluate", config.data.evaluate, evaluate))
    for where, spec, data in specs:
        first = root_of(data)
        if isinstance(first, UserData):
            _compare(first, _data_set(config, spec, where), where)


def _compare(first: UserData, second: Data, where: str) -> None:
    cure = (
        "make it depend on its arguments alone: seed the generators that it makes itself (numpy.random.default_rng(0), "
        "random.Random(0)), sort what comes from a set, a folder or a dict"
    )
    for what, one, other in (
        ("length", len(first), len(second)),
        ("input_shape", first.input_shape, second.input_shape),
        ("classes", first.class_names, second.class_names),
    ):
        if one != other:
            raise DataError(f"{where}: {first.kind} built twice differs in its {what}: {one} and {other}; {cure}")
    chosen, read = _read_for_a_while(first)
    again = [_sample(second, index) for index in reversed(chosen)][::-1]
    for index, sample, same in zip(chosen, read, again, strict=True):
        if not _equal(sample, same):
            raise DataError(
                f"{where}: sample {index} of {first.kind} differs when the data set is built and read again; {cure}; and "
                "draw random numbers while reading from torch's, NumPy's or Python's global generators, which are seeded "
                "for each sample"
            )


def _read_for_a_while(data: Data) -> tuple[list[int], list[Pair | None]]:
    """(numbers, samples) of samples spread over the data set; of one that is slow to read, only the first of them."""
    chosen = np.unique(np.linspace(0, len(data) - 1, min(len(data), _COMPARED)).astype(np.int64)).tolist()
    read: list[Pair | None] = []
    deadline = time.monotonic() + _COMPARE_S
    for index in chosen:
        if time.monotonic() > deadline and len(read) >= _COMPARED_AT_LEAST:
            break
        read.append(_sample(data, index))
    return chosen[: len(read)], read


def _sample(data: Data, index: int) -> Pair | None:
    """One sample, read with seeded generators; None for a bad record. Raises DataError where it draws unexpectedly."""
    indices: Indices = np.array([index], dtype=np.int64)
    with own_generators() as drew:
        try:
            if data.draws_random_numbers:
                return data.gather_seeded(indices, [stream_seed(0, index)])
            pair = data.gather(indices)
        except BadRecords:
            return None
        if drew():
            raise DataError(
                f"sample {index} of {data.source} draws random numbers ({', '.join(sorted(drew()))}), most others don't: "
                "give the class the attribute draws_random_numbers = True, so that all are read with seeded generators"
            )
    return pair


def _equal(one: Pair | None, other: Pair | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(one, other, strict=True)
    )
