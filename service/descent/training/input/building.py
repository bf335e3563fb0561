"""The data sets of a config: built, split, and checked to come out the same however often they are built."""

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from descent.config import RunConfig, build, resolve_target
from descent.data.bad_records import BadRecords
from descent.data.base import BatchDataset, Data, Indices, indices_in_root, root_of
from descent.data.batch import Batch, tensors_of
from descent.data.cache import use_cache
from descent.data.csv_file import Csv
from descent.data.data_thread import in_data_thread
from descent.data.generators import own_generators
from descent.data.identity import require_digest
from descent.data.map_style import Collate, MapStyle, UserData, adapt
from descent.data.splits import hold_out, split
from descent.data.table_columns import TableData
from descent.errors import ConfigError, DataError
from descent.training.input import samplers
from descent.training.input.permutation import stream_seed
from descent.training.input.samplers import EpochOrder

_COMPARED, _COMPARED_AT_LEAST = 64, 4  # samples that are read twice
_COMPARE_S = 3.0
_TRIES = 5
_DEFAULT_HOLDOUT = 0.1


def build_data(
    config: RunConfig, digest: str | None = None, collate: Collate | None = None
) -> tuple[Data, Data | None]:
    """The training set and the evaluation set (None without one).

    digest: what `digest_to_compare` gave for the training set when the run began.
    collate: the task's own collate function, which `data.collate` replaces.
    Raises ConfigError or DataError.
    """
    sets = build_sets(config, collate)
    require_digest(sets.train, digest, "data.train")
    return sets.train, sets.evaluate


class DataSets(NamedTuple):
    """The data sets of a run."""

    train: Data
    evaluate: Data | None
    """Evaluated while the run trains."""
    test: Data | None
    """Evaluated once, at the end, with the best weights."""
    others: Mapping[str, Data] = MappingProxyType({})
    """Further sets that are evaluated while the run trains, by name."""


def build_sets(config: RunConfig, collate: Collate | None = None) -> DataSets:
    """The data sets of the config. collate: the task's own collate function, which `data.collate` replaces.

    Raises ConfigError or DataError.
    """
    collate = _collate_of(config) or collate
    use_cache(config.data.cache.dir, config.data.cache.gb)
    sets = _train_and_held_out(config, collate)
    if isinstance(config.data.test, Mapping):
        test = _data_set(config, config.data.test, "data.test", collate)
        sets = sets._replace(test=_following(test, sets.train, "data.test"))
    others = {
        name: _following(_data_set(config, spec, where := f"data.evaluations.{name}", collate), sets.train, where)
        for name, spec in config.data.evaluations.items()
    }
    if others and sets.evaluate is None:
        raise ConfigError(
            f"data.evaluations.{next(iter(others))}: comes in addition to the evaluation set, and there is none; set "
            "data.evaluate or data.holdout"
        )
    return sets._replace(others=others)


def keep_precision(model: nn.Module, *sets: Data | None) -> None:
    """Let the data sets give float64 where the model's parameters are float64."""
    if any(p.dtype is torch.float64 for p in model.parameters()):
        for data in sets:
            if data is not None and isinstance(root := root_of(data), MapStyle):
                root.keep_float64()


def _collate_of(config: RunConfig) -> Collate | None:
    """The collate function of `data.collate`: the function itself, or an object that is called with the samples."""
    spec = config.data.collate
    if spec is None:
        return None
    where = "data.collate"
    target = resolve_target(spec["_target_"], config.trusted_modules, f"{where}._target_")
    arguments = {key: value for key, value in spec.items() if key != "_target_"}
    with own_generators(seed=config.seed):
        if inspect.isfunction(target) and _takes_samples(target, arguments):
            return functools.partial(target, **arguments) if arguments else target
        collate = build(spec, config.trusted_modules, where)
    if not callable(collate):
        raise ConfigError(
            f"{where}._target_={spec['_target_']}: gives a {type(collate).__name__}, not a function from a list of samples "
            "to a batch"
        )
    made: Collate = collate
    return made


def epoch_order_of(config: RunConfig, train: Data, batch_size: int) -> EpochOrder | None:
    """The order of `data.sampler`; None where every sample comes up once an epoch. Raises ConfigError."""
    given = config.data.sampler
    if given is None:
        return None
    if isinstance(given, str):
        return samplers.bound(samplers.SHORT_NAMES[given](), train, batch_size, config.seed, f"data.sampler={given}")
    where = f"data.sampler._target_={given['_target_']}"
    target = resolve_target(given["_target_"], config.trusted_modules, "data.sampler._target_")
    with own_generators(seed=config.seed):
        if inspect.isfunction(target):
            arguments = {key: value for key, value in given.items() if key != "_target_"}
            sampler: Any = functools.partial(target, **arguments) if arguments else target
        else:
            sampler = build(given, config.trusted_modules, "data.sampler")
    return samplers.bound(sampler, train, batch_size, config.seed, where)


def _takes_samples(function: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
    """Whether the function takes one thing more than its arguments in the config: the samples."""
    parameters = inspect.signature(function).parameters.values()
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len([name for name in required if name not in arguments]) == 1


def target_scale(config: RunConfig, train: Data) -> list[float] | None:
    """[mean, deviation] of the values that a model is to predict; None where it takes none."""
    root = root_of(train)
    if not isinstance(root, TableData) or root.target_scale is None or not _predicts_values(config):
        return None
    model = resolve_target(config.model["_target_"], config.trusted_modules, "model._target_")
    if not inspect.isclass(model) or "target_scale" not in inspect.signature(model).parameters:
        return None
    return list(root.target_scale)


def _predicts_values(config: RunConfig) -> bool:
    """Whether the loss compares values with values, so that whole numbers in a table are no classes."""
    if config.task is not None:
        return False
    loss = resolve_target(config.loss["_target_"], config.trusted_modules, "loss._target_")
    return inspect.isclass(loss) and issubclass(loss, nn.MSELoss | nn.L1Loss | nn.SmoothL1Loss | nn.HuberLoss)


def digest_to_compare(train: Data) -> str | None:
    """The digest with which each worker compares its training set; None for a user's class.

    A user's class is built twice before the run instead: its digest reads samples, which may take long.
    """
    return None if isinstance(root_of(train), UserData) else train.digest


def _train_and_held_out(config: RunConfig, collate: Collate | None) -> DataSets:
    share = 0.0 if isinstance(config.data.test, Mapping) else config.data.test
    whole = _data_set(config, config.data.train, "data.train", collate)
    if config.data.evaluate is None:
        cut: Callable[[], DataSets] = lambda: DataSets(*split(whole, config.data.holdout, share, config.seed))  # noqa: E731
        return _learned(whole, cut)
    _refuse_unused_shares(config)
    evaluate = _data_set(config, config.data.evaluate, "data.evaluate", collate)
    if not share:
        return DataSets(whole, _following(evaluate, whole, "data.evaluate"), None)

    def hold_back() -> DataSets:
        # The evaluation set is one of its own, so the test part comes out of the training set.
        kept, test = hold_out(whole, share, config.seed, "data.test")
        return DataSets(kept, evaluate, test)

    sets = _learned(whole, hold_back)
    return sets._replace(evaluate=_following(evaluate, whole, "data.evaluate"))


def _learned(whole: Data, cut: Callable[[], DataSets]) -> DataSets:
    """The parts of a data set; a table takes its statistics from the rows that are trained on, and no others."""
    sets = cut()
    if isinstance(whole, TableData):
        whole.learn_of(indices_in_root(sets.train, np.arange(len(sets.train))))
        sets = cut()  # views of what the table is now
    return sets


def _following(data: Data, train: Data, where: str) -> Data:
    """A further data set; a table is laid out as the training set's is."""
    table = root_of(train)
    if isinstance(table, TableData) and isinstance(data, TableData):
        data.follow(table, where)
    return data


def _refuse_unused_shares(config: RunConfig) -> None:
    """Raise ConfigError for shares that were set and that nothing follows, since the data has an evaluation set."""
    name, evaluate = config.data.name, config.data.evaluate or {}
    cure = "leave it out, or let Descent split the data: data.evaluate=null"
    if "split" in config.data.train:
        cure += " and data.train.split=all"
    if config.data.holdout != _DEFAULT_HOLDOUT and "holdout" not in {**config.data.train, **evaluate}:
        raise ConfigError(
            f"data.holdout={config.data.holdout:g}: {name} has an evaluation set of its own, so nothing is held out; {cure}"
        )


def _data_set(config: RunConfig, spec: Mapping[str, Any], where: str, collate: Collate | None = None) -> Data:
    """The data set of a spec, built in the thread in which it will be read."""
    data = in_data_thread(_build, config, spec, where)
    if isinstance(data, IterableDataset):
        raise ConfigError(
            f"{where}: {type(data).__name__} is a stream (IterableDataset), whose samples have no numbers, so nobody can say "
            "which of them a step has used; write it into shards once (`descent data index`), or make it a map-style "
            "Dataset with __len__ and __getitem__"
        )
    if isinstance(data, DataLoader):
        raise ConfigError(
            f"{where}: is a DataLoader, but Descent makes the batches itself; give the data set that the loader reads: its "
            "batch_size is batch.size, its collate_fn data.collate, its sampler data.sampler, and no num_workers is needed"
        )
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise ConfigError(
            f"{where}: {type(data).__name__} has no __len__ and __getitem__, so it is not a map-style Dataset"
        )
    adapted = adapt(data, config.data.on_error, collate)
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
        if target is Csv and spec.get("targets_are") is None and _predicts_values(config):
            spec = {**spec, "targets_are": "values"}
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
            again = _data_set(config, spec, where, first.own_collate if isinstance(first, MapStyle) else None)
            if isinstance(again, MapStyle) and isinstance(first, MapStyle) and first.keeps_float64:
                again.keep_float64()
            _compare(first, again, where)


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


def _read_for_a_while(data: Data) -> tuple[list[int], list[Batch | None]]:
    """(numbers, samples) of samples spread over the data set; of one that is slow to read, only the first of them."""
    chosen = np.unique(np.linspace(0, len(data) - 1, min(len(data), _COMPARED)).astype(np.int64)).tolist()
    read: list[Batch | None] = []
    deadline = time.monotonic() + _COMPARE_S
    for index in chosen:
        if time.monotonic() > deadline and len(read) >= _COMPARED_AT_LEAST:
            break
        read.append(_sample(data, index))
    return chosen[: len(read)], read


def _sample(data: Data, index: int) -> Batch | None:
    """One sample, read with seeded generators; None for a bad record. Raises DataError where it draws unexpectedly."""
    indices: Indices = np.array([index], dtype=np.int64)
    drawn: set[str] = set()
    for _ in range(_TRIES):
        with own_generators() as drew:
            try:
                if data.draws_random_numbers:
                    return data.gather_seeded(indices, [stream_seed(0, index)])
                batch = data.gather(indices)
            except BadRecords:
                return None
            drawn = drew()
        if not drawn:
            return batch
        # Perhaps another thread of the process drew in this moment; a sample that draws does so each time.
    raise DataError(
        f"sample {index} of {data.source} draws random numbers ({', '.join(sorted(drawn))}), most others don't: "
        "give the class the attribute draws_random_numbers = True, so that all are read with seeded generators"
    )


def _equal(one: Batch | None, other: Batch | None) -> bool:
    if one is None or other is None:
        return one is other
    ours, theirs = list(tensors_of(one)), list(tensors_of(other))
    return [path for path, _ in ours] == [path for path, _ in theirs] and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for (_, a), (_, b) in zip(ours, theirs, strict=True)
    )
