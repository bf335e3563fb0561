"""One forward and backward before any worker exists: what a user's model, loss and data can get wrong."""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from descent.config import RunConfig
from descent.config.build import in_one_line
from descent.data.bad_records import read_good
from descent.data.base import Data, indices_in_root, root_of
from descent.data.batch import Batch, describe
from descent.data.generators import own_generators
from descent.errors import ConfigError, DataError, DescentError
from descent.optim.plateau import Plateau
from descent.training.buffer_rules import find_rules
from descent.training.buffers import Rule
from descent.training.carried import STATELESS, Kept, asks_for_state, carried_state
from descent.training.determinism import refuse_undeterministic
from descent.training.loss_check import check_pair, settle
from descent.training.model_snapshot import ModelSnapshot
from descent.training.objective import Objective, Reading

_SAMPLES = 8
"""Samples on which the meaning of a loss is found out."""
_LARGE_OUTPUT = 1 << 20
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
class Cut:
    """How a run's global batch is cut."""

    batch: int
    """Samples of the global batch."""
    slots: int
    micro: int
    """The most samples of a forward."""

    @property
    def smallest(self) -> int:
        """The fewest samples that a forward of the run will see."""
        sizes = {self.batch // self.slots, -(-self.batch // self.slots)}
        return min((size % self.micro) or self.micro for size in sizes)

    @property
    def whole(self) -> bool:
        """Whether each step's batch is computed in one forward."""
        return self.slots == 1 and self.micro >= self.batch


@dataclass(frozen=True)
class Seen:
    """What one forward and backward showed of a model."""

    changing_buffers: tuple[str, ...]
    uses_non_torch_rng: bool
    """Whether random numbers were drawn that are not torch's."""
    unused_parameters: bool
    objective: Objective
    """The loss, with the dimension of the outputs that holds the classes."""
    output_size: int
    """Entries of a sample's output."""


@dataclass(frozen=True)
class SettledLoss:
    """The loss, read as its numbers show that it is meant."""

    objective: Objective
    terms: float
    """Loss terms a sample."""
    uses_non_torch_rng: bool
    """Whether model or loss drew random numbers that are not torch's."""


def read(config: RunConfig, data: Data, indices: Any, where: str) -> Batch:
    """`data.gather` with the run's policy on bad records, and the user's exceptions as DataError."""
    wanted = np.asarray(indices, dtype=np.int64)
    try:
        return read_good(data.gather, wanted, len(data), config.data.on_error)[0]
    except DescentError:
        raise
    except Exception as error:
        raise DataError(f"{where}: reading samples failed: {in_one_line(error)}") from error


def as_pair(batch: Batch, where: str) -> tuple[Tensor, Tensor]:
    """A batch as (inputs, targets). Raises ConfigError for one that is no pair of tensors."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    raise ConfigError(
        f"{where}: its batches are {describe(batch)}; with a model and a loss alone they must be pairs (input, target). "
        "Say what the loss of such a batch is: task=custom task._target_=my_module.loss, a function loss(model, batch); "
        "or task=auto for a model that returns its own loss"
    )


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
    cut: Cut,
) -> Seen:
    """One forward and backward on a sample or two; the model is left as it was.

    Raises ConfigError or DataError in the words of the config.
    """
    # Two samples where there are two: batch norm can't train on a single one.
    count = min(2, len(data), max(1, cut.micro))
    inputs, targets = as_pair(read(config, data, np.arange(count), "data.train"), "data.train")
    before, kept = ModelSnapshot.of(model), Kept.of(model)
    model.train()
    with own_generators(seed=0) as drew:
        output = _forward(config, model, inputs)
        objective = _with_class_dimension(config, model, objective, inputs, output, targets)
        loss = _loss(config, objective, output, targets, "data.train")
        drawn = drew()
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
    written = before.written(model)
    carried = carried_state(kept, before, model, None, inputs, count, model, output)
    if carried is not None:
        raise ConfigError(f"{_where(config)}: carries {carried!r} from batch to batch; {STATELESS}")
    if cut.smallest == 1:
        check_single_samples(config, lambda: model(inputs[:1]))
    objection = before.objection(model, written)
    if objection is not None:
        raise ConfigError(f"{_where(config)}: {objection}")
    before.put_back(model)
    _check_repeats(config, model, inputs, output.detach(), kept)
    before.put_back(model)
    unused = any(p.grad is None for p in model.parameters() if p.requires_grad)
    refuse_sparse(config, model, cut.slots == 1)
    model.zero_grad(set_to_none=True)
    return Seen(written, bool(drawn - {"torch"}), unused, objective, output[0].numel())


def settle_buffers(config: RunConfig, model: nn.Module, names: tuple[str, ...], data: Data) -> tuple[Rule, ...]:
    """How each of the changing buffers is combined over the slots. Raises ConfigError for one that can't be."""
    if not names:
        return ()
    try:
        inputs = read(config, data, np.linspace(0, len(data) - 1, min(4, len(data))), "data.train")[0]
    except DataError:  # samples of several shapes, which only go one by one
        inputs = read(config, data, [0], "data.train")[0]
    return find_rules(model, names, lambda a, b: _forward(config, model, inputs[a:b]), len(inputs), _where(config))


def settle_loss(
    config: RunConfig, model: nn.Module, seen: Seen, data: Data, micro_size: int, *, whole: bool
) -> SettledLoss:
    """Find out on a few samples what the loss's number for a batch means; the model is left as it was.

    whole: whether each step's batch is computed in one forward. Raises ConfigError for a loss that would be
    read wrongly.
    """
    objective = seen.objective
    most = min(len(data), max(1, micro_size))
    if objective.is_known:
        count = min(2, most)
        targets = read(config, data, np.arange(count), "data.train")[1]
        return SettledLoss(objective, float(objective.num_terms(targets)) / count or 1.0, False)
    before = ModelSnapshot.of(model)
    # Samples from everywhere, so that their labels differ; fewer where each has millions of outputs.
    count = min(_SAMPLES if seen.output_size < _LARGE_OUTPUT else 2, most)
    inputs, targets = read(config, data, np.linspace(0, len(data) - 1, count), "data.train")
    with torch.no_grad(), own_generators(seed=0) as drew:
        output = _forward(config, model, inputs)
        _loss(config, objective, output, targets, "data.train")
        drawn = drew()
    before.put_back(model)
    objective = settle(objective, output, targets, f"loss._target_={config.loss['_target_']}", whole=whole)
    terms = float(objective(output, targets).terms) / count or 1.0  # only a scale: these may all be ignored
    return SettledLoss(objective, terms, bool(drawn - {"torch"}))


def _with_class_dimension(
    config: RunConfig, model: nn.Module, objective: Objective, inputs: Tensor, output: Tensor, targets: Tensor
) -> Objective:
    """Decide once for the run which dimension of the outputs holds the classes: torch's, 1, or the last."""
    if not objective.by_class or output.dim() <= 2 or targets.shape != output.shape[:-1]:
        return objective
    fits_torch = targets.shape == (output.shape[0], *output.shape[2:])
    stated = getattr(model, "classes_last", None)
    if fits_torch and stated is None and inputs.shape == targets.shape and not inputs.is_floating_point():
        raise ConfigError(
            f"{_where(config)}: outputs {list(output.shape)} with targets {list(targets.shape)} can be read in two "
            "ways: a row of logits for each token, or, as torch has it, the classes in dimension 1; set the attribute "
            "classes_last = True or classes_last = False in the model's __init__"
        )
    return replace(objective, classes_last=not fits_torch if stated is None else bool(stated))


def refuse_sparse(config: RunConfig, model: nn.Module, one_slot: bool) -> None:
    """Where gradients are not added up in one dense buffer, a sparse one would meet kernels that don't take it."""
    if config.reduction != "fast" and not one_slot:
        return
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise ConfigError(
                f"{_where(config)}: the gradient of {name!r} is sparse, which reduction=fast can't add up over workers "
                "and most optimizers can't take; build the layer with sparse=False, or use reduction=exact with "
                "slots=2 or more"
            )


def _check_repeats(config: RunConfig, model: nn.Module, inputs: Tensor, first: Tensor, kept: Kept) -> None:
    """Whether the output is a function of inputs, parameters, buffers and the generators' seed."""
    with own_generators(seed=0):
        again = _forward(config, model, inputs).detach()
    if config.reduction == "exact" and not torch.equal(first.nan_to_num(), again.nan_to_num()):
        raise ConfigError(
            f"{_where(config)}: gives another output when the same samples come again, with the same weights, "
            f"buffers and seeds: it keeps {kept.named(model)}, which no checkpoint holds and no other worker has; make "
            "it a buffer (register_buffer), or use reduction=fast, which doesn't promise equal bits; or, where it is a "
            "state that is carried from batch to batch, begin each forward with a new one"
        )


def check_single_samples(config: RunConfig, forward_one: Callable[[], object]) -> None:
    """A forward in training on one sample, where the batch's cut will bring one."""
    try:
        with torch.no_grad():
            forward_one()
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
    classes = output.shape[objective.class_dimension(output, targets)]
    root = root_of(data)
    stored = root.labels
    if stored is not None:
        if root is not data and stored.dim() == 1:
            stored = stored[torch.from_numpy(indices_in_root(data, np.arange(len(data))))]
        _labels_in_range(objective, stored, classes, where)
        _refuse_all_ignored(objective, stored, where)
        return
    # where a sample must be read, decoded or fetched, few are looked at; of shards, the first ones
    most = min(_ALL_LABELS, 65536 if root.in_memory else 256)
    wanted = min(len(data), max(1, most // max(1, targets[0].numel())))
    indices = np.linspace(0, len(data) - 1, wanted).astype(np.int64)
    if data.layout is not None:
        indices = np.arange(wanted, dtype=np.int64)
    found = read(config, data, indices, where)[1]
    _labels_in_range(objective, found, classes, where, indices)
    if wanted == len(data):
        _refuse_all_ignored(objective, found, where)


def check_figures(config: RunConfig, figures: Sequence[str], evaluate: Data | None) -> None:
    """Raise ConfigError where a setting names a figure that this run's evaluations don't have."""
    keep, stop = config.checkpoint.keep_best, config.stop
    asked = {}
    if keep is not None and (
        evaluate is not None or keep.metric != "eval/loss"
    ):  # the default, also without evaluations
        asked["checkpoint.keep_best"] = keep.metric
    if stop is not None:
        asked["stop.metric"] = stop.metric
    if "plateau" in str(config.schedule["_target_"]) and config.schedule.get("metric"):
        asked["schedule.metric"] = str(config.schedule["metric"])
    names = [f"eval/{name}" for name in figures]
    for key, metric in asked.items():
        if evaluate is None:
            raise ConfigError(f"{key}={metric}: there is nothing to evaluate on; set data.holdout, or {key}=null")
        if metric not in names:
            similar = difflib.get_close_matches(metric, names, 1)
            hint = f"did you mean {similar[0]}?" if similar else f"there are {', '.join(names)}"
            raise ConfigError(f"{key}={metric}: the evaluations of this run have no such figure; {hint}")


def _refuse_all_ignored(objective: Objective, labels: Tensor, where: str) -> None:
    if objective.num_labels(labels) == 0:
        raise DataError(
            f"{where}: all {labels.numel()} labels are ignored (ignore_index={objective.ignored}), so there is "
            "nothing to compute a loss from; mend the labels, or set loss.ignore_index to another value"
        )


def check_schedule(config: RunConfig, schedule: Any, total_steps: int, *, evaluates: bool) -> None:
    """Whether it is a function from step to multiplier, gives the same whenever it is asked, and has what it goes by."""
    where = f"schedule._target_={config.schedule['_target_']}"
    steps = sorted({0, 1, total_steps // 2, max(total_steps - 1, 0)})
    try:
        found = {step: schedule(step) for step in steps}
        again = {step: schedule(step) for step in reversed(steps)}
    except Exception as error:
        raise ConfigError(f"{where}: must be a function from step to multiplier: {in_one_line(error)}") from error
    for step, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{where}: gives {value!r} for step {step}, must be a finite number")
        if again[step] != value:
            raise ConfigError(
                f"{where}: gives {value:g} for step {step}, and {again[step]:g} when it is asked again; a schedule is a "
                "function of the step alone, so that a resumed run goes on with the same learning rates"
            )
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
        state = asks_for_state(error)
        if state is not None:
            raise ConfigError(f"{where}: its forward takes {state!r} beside the inputs; {STATELESS}") from error
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
    """The loss of a batch as its author built it, one number with its graph. Raises ConfigError or DataError."""
    where = f"loss._target_={config.loss['_target_']}"
    given = f"outputs {list(output.shape)}, {output.dtype} with targets {list(targets.shape)}, {targets.dtype}"
    if objective.by_class:
        _check_classes(objective, output, targets, f"{where}: can't compare {given}", data)
    # torch would broadcast these, and train on nonsense
    if isinstance(objective.loss, _ENTRY_BY_ENTRY) and output.numel() != targets.numel():
        raise ConfigError(
            f"{where}: can't compare {given}: it needs one target for each output; "
            "classes go with loss=cross_entropy, one value a sample with model.num_outputs=1"
        )
    try:
        loss = objective.as_built(*objective.fitted(output, targets))
    except Exception as error:
        raise ConfigError(f"{where}: can't compare {given}: {in_one_line(error)}") from error
    if isinstance(loss, tuple | list) and objective.reading in (Reading.SAMPLES, Reading.PAIR):
        check_pair(loss, where)
        loss = loss[0]
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        shape = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"{where}: gives {shape}, Descent needs one number a batch")
    return loss


def _check_classes(objective: Objective, output: Tensor, targets: Tensor, where: str, data: str) -> None:
    """Whether targets are class numbers within the outputs, or probabilities of them. Raises ConfigError or DataError."""
    if targets.is_floating_point() and (output.shape != targets.shape or output.dim() < 2 or output.shape[1] == 1):
        raise ConfigError(
            f"{where}: class labels must be whole numbers (int64), one for each output row, and floating-point targets "
            "one probability for each class; store the labels as integers, or, where the targets are values to "
            "predict, use loss=mse"
        )
    if output.dim() < 2:
        raise ConfigError(f"{where}: it needs one output for each class")
    classes = output.shape[objective.class_dimension(output, targets)]
    if classes == 1:
        raise ConfigError(
            f"{where}: with one output there is one class, and the loss is always 0; use loss=bce_with_logits for "
            "yes or no, loss=mse for values, or set model.num_outputs to the number of classes"
        )
    if not targets.is_floating_point():
        _labels_in_range(objective, targets, classes, data)


def _labels_in_range(objective: Objective, targets: Tensor, classes: int, where: str, indices: Any = None) -> None:
    ignored = objective.ignored
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
