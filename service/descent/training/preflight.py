"""One forward and backward before any worker exists: what a user's model, loss and data can get wrong."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from descent.config import RunConfig
from descent.config.build import in_one_line
from descent.data.bad_records import read_good
from descent.data.base import Data, indices_in_root, root_of
from descent.data.generators import own_generators
from descent.errors import ConfigError, DataError, DescentError
from descent.optim.plateau import Plateau
from descent.training.determinism import refuse_undeterministic
from descent.training.model_snapshot import ModelSnapshot
from descent.training.objective import Objective

_ALL_LABELS = 1 << 22
"""Labels up to this many are all checked; of larger data sets an even sample is."""
_ENTRY_BY_ENTRY = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
)


@dataclass(frozen=True)
class Seen:
    """What one forward and backward showed of a model."""

    changing_buffers: tuple[str, ...]
    uses_non_torch_rng: bool
    """Whether random numbers were drawn that are not torch's."""
    unused_parameters: bool
    terms: float
    """Loss terms a sample."""


def read(config: RunConfig, data: Data, indices: Any, where: str) -> tuple[Tensor, Tensor]:
    """`data.gather` with the run's policy on bad records, and the user's exceptions as DataError."""
    wanted = np.asarray(indices, dtype=np.int64)
    try:
        return read_good(data.gather, wanted, len(data), config.data.on_error)[0]
    except DescentError:
        raise
    except Exception as error:
        raise DataError(f"{where}: reading samples failed: {in_one_line(error)}") from error


def materialize(config: RunConfig, model: nn.Module, data: Data) -> None:
    """Give lazy modules (torch.nn.LazyLinear …) their shapes, by one sample in evaluation."""
    inputs, _ = read(config, data, [0], "data.train")
    torch.manual_seed(config.seed)
    model.eval()
    with torch.no_grad():
        _forward(config, model, inputs)
    model.train()


def try_one(
    config: RunConfig,
    model: nn.Module,
    objective: Objective,
    data: Data,
    micro_size: int,
    smallest: int,
) -> Seen:
    """One forward and backward on a sample or two; the model is left as it was.

    smallest: the fewest samples that a forward of this run will see.
    Raises ConfigError or DataError in the words of the config.
    """
    # Two samples where there are two: batch norm can't train on a single one.
    count = min(2, len(data), max(1, micro_size))
    inputs, targets = read(config, data, np.arange(count), "data.train")
    before = ModelSnapshot.of(model)
    model.train()
    with own_generators(seed=0) as drew:
        output = _forward(config, model, inputs)
        uses_non_torch_rng = bool(drew() - {"torch"})
    loss = _loss(config, objective, output, targets, "data.train")
    if not loss.requires_grad:
        raise ConfigError(
            f"{_where(config)}: no gradient reaches its parameters from the loss; "
            "is something detached, or under no_grad?"
        )
    try:
        loss.backward()
    except Exception as error:
        refuse_undeterministic(error)
        raise ConfigError(f"{_where(config)}: the backward failed: {in_one_line(error)}") from error
    if smallest == 1:
        _forward_one(config, model, inputs)
    written = before.written(model)
    objection = before.objection(model, written)
    if objection is not None:
        raise ConfigError(f"{_where(config)}: {objection}")
    before.put_back(model)
    _check_repeats(config, model, inputs, output.detach())
    before.put_back(model)
    unused = any(p.grad is None for p in model.parameters() if p.requires_grad)
    model.zero_grad(set_to_none=True)
    terms = float(objective.count(targets)) / count or 1.0  # only a scale: these may all be ignored
    return Seen(written, uses_non_torch_rng, unused, terms)


def _check_repeats(config: RunConfig, model: nn.Module, inputs: Tensor, first: Tensor) -> None:
    """Whether the output is a function of inputs, parameters, buffers and the generators' seed."""
    with own_generators(seed=0):
        again = _forward(config, model, inputs).detach()
    if config.reduction == "exact" and not torch.equal(first.nan_to_num(), again.nan_to_num()):
        raise ConfigError(
            f"{_where(config)}: gives another output when the same samples come again, with the same weights, "
            "buffers and seeds: it keeps something else, which no checkpoint holds and no other worker has; make "
            "it a buffer (register_buffer), or use reduction=fast, which doesn't promise equal bits"
        )


def _forward_one(config: RunConfig, model: nn.Module, inputs: Tensor) -> None:
    """A forward in training on one sample, where the batch's cut will bring one."""
    try:
        with torch.no_grad():
            model(inputs[:1])
    except Exception as error:
        raise ConfigError(
            f"batch.size={config.batch.size}, batch.micro_size={config.batch.micro_size}: some forwards get one "
            f"sample, and this model can't train on one: {in_one_line(error)}; choose sizes that leave no single sample"
        ) from error


def check_outputs(config: RunConfig, model: nn.Module, objective: Objective, data: Data, where: str) -> None:
    """One sample through the model in evaluation, and every label against the number of outputs.

    Of very large sets an even sample of the labels is looked at.
    """
    inputs, targets = read(config, data, [0], where)
    model.eval()
    with torch.no_grad():
        try:
            output = _forward(config, model, inputs)
            _loss(config, objective, output, targets, where)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    model.train()
    if not objective.by_class or targets.is_floating_point():
        return
    # Classes stand last, or second where each place of an image has a class of its own.
    by_place = output.dim() > 2 and output.shape[:-1] != targets.shape
    classes = output.shape[1] if by_place else output.shape[-1]
    root = root_of(data)
    stored = root.labels
    if stored is not None:
        if root is not data and stored.dim() == 1:
            stored = stored[torch.from_numpy(indices_in_root(data, np.arange(len(data))))]
        _labels_in_range(stored, classes, where, config)
        return
    # where a sample must be read, decoded or fetched, few are looked at; of shards, the first ones
    most = min(_ALL_LABELS, 65536 if root.in_memory else 256)
    wanted = min(len(data), max(1, most // max(1, targets[0].numel())))
    indices = np.linspace(0, len(data) - 1, wanted).astype(np.int64)
    if data.layout is not None:
        indices = np.arange(wanted, dtype=np.int64)
    _labels_in_range(read(config, data, indices, where)[1], classes, where, config, indices)


def check_schedule(config: RunConfig, schedule: Any, evaluates: bool) -> None:
    """Whether it is a function from step to multiplier, and has what it goes by."""
    name = config.schedule["_target_"]
    try:
        first = schedule(0)
    except Exception as error:
        raise ConfigError(
            f"schedule._target_={name}: must be a function from step to multiplier: {in_one_line(error)}"
        ) from error
    if isinstance(first, bool) or not isinstance(first, int | float) or not math.isfinite(first):
        raise ConfigError(f"schedule._target_={name}: gives {first!r} for step 0, must be a finite number")
    if isinstance(schedule, Plateau) and not evaluates:
        raise ConfigError(
            "schedule=plateau: goes by the evaluation loss, and there is nothing to evaluate on; "
            "set data.holdout or take another schedule"
        )


def _where(config: RunConfig) -> str:
    return f"model._target_={config.model['_target_']}"


def _forward(config: RunConfig, model: nn.Module, inputs: Tensor) -> Tensor:
    where = _where(config)
    try:
        output = model(inputs)
    except DescentError:
        raise
    except Exception as error:
        refuse_undeterministic(error)
        raise ConfigError(
            f"{where}: can't take this data: inputs of shape {list(inputs.shape[1:])}, {inputs.dtype}: "
            f"{in_one_line(error)}"
        ) from error
    if not isinstance(output, Tensor):
        raise ConfigError(f"{where}: forward gives a {type(output).__name__}, Descent needs one tensor")
    if output.dim() == 0 or output.shape[0] != inputs.shape[0]:
        raise ConfigError(
            f"{where}: forward gives shape {list(output.shape)} for {inputs.shape[0]} samples, "
            "Descent needs one row a sample"
        )
    return output


def _loss(config: RunConfig, objective: Objective, output: Tensor, targets: Tensor, data: str) -> Tensor:
    where = f"loss._target_={config.loss['_target_']}"
    given = f"outputs {list(output.shape)}, {output.dtype} with targets {list(targets.shape)}, {targets.dtype}"
    if objective.by_class and not targets.is_floating_point():
        _labels_in_range(targets, output.shape[-1], data, config)
    # torch would broadcast these, and train on nonsense
    if isinstance(objective.loss, _ENTRY_BY_ENTRY) and output.numel() != targets.numel():
        raise ConfigError(
            f"{where}: can't compare {given}: it needs one target for each output; "
            "classes go with loss=cross_entropy, one value a sample with model.num_outputs=1"
        )
    try:
        loss = objective(output, targets)
    except Exception as error:
        raise ConfigError(f"{where}: can't compare {given}: {in_one_line(error)}") from error
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        shape = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"{where}: gives {shape}, Descent needs one number a batch")
    return loss


def _labels_in_range(targets: Tensor, classes: int, where: str, config: RunConfig, indices: Any = None) -> None:
    ignored = config.loss.get("ignore_index", -100)
    if targets.dtype is torch.uint8:
        targets = targets.short()  # in uint8 a bound of 256 or an ignored -100 would wrap around
    wrong = ((targets < 0) | (targets >= classes)) & (targets != ignored)
    if not bool(wrong.any()):
        return
    row = int(wrong.reshape(len(targets), -1).any(1).nonzero()[0])
    label = int(targets[wrong][0])
    number = row if indices is None else int(indices[row])
    remedy = "mend the data" if label < 0 else f"set model.num_outputs={label + 1} or mend the data"
    raise DataError(
        f"{where}: sample {number} has label {label}, but the model has {classes} outputs "
        f"(0 to {classes - 1}); {remedy}"
    )
