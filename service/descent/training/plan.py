"""From a config to what a run will do: data, model and every derived number, checked before any actor starts."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from descent.config import RunConfig, WorkerRange, build, build_function, resolve_target
from descent.config.given import builds_anew
from descent.data.base import Data
from descent.data.generators import own_generators, python_and_numpy_seeded
from descent.data.identity import identity_of
from descent.errors import ConfigError
from descent.optim.memory_layout import shares_places
from descent.optim.optimizers import build_optimizer
from descent.optim.parameter_groups import freeze, groups_of
from descent.training.buffers import Rule, own_buffer, owners_of
from descent.training.determinism import deterministic
from descent.training.evaluation_results import State
from descent.training.freezing import check_length
from descent.training.input.building import build_data as build_data
from descent.training.input.building import (
    build_sets,
    digest_to_compare,
    epoch_order_of,
    keep_precision,
    refuse_unrepeatable,
    target_scale,
)
from descent.training.loss_check import refuse_unseeded
from descent.training.loss_parameters import attach, attached, detach
from descent.training.objective import Objective, Reading, with_tensors
from descent.training.phases import Phase, build_phased, check_modules, phases_of
from descent.training.preflight import (
    Cut,
    as_pair,
    check_figures,
    check_outputs,
    check_schedule,
    materialize,
    read,
    settle_buffers,
    settle_loss,
    try_one,
)
from descent.training.task import OwnTask, Supervised, build_task
from descent.training.task_check import Found, check_evaluation, check_phases, check_task

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype in which the model computes with a `precision` other than fp32."""


@dataclass(frozen=True)
class Plan:
    """The derived numbers of a run; plain values, so that it crosses processes as a dict."""

    total_steps: int
    batch_size: int
    num_samples: int
    num_evaluation: int
    steps_per_epoch: int
    slots: int
    min_workers: int
    max_workers: int
    micro_size: int
    nominal: float
    """Loss terms in a global batch, if none is ignored."""
    threads: int
    device: str
    gpus: float
    """What a worker takes; less than one is a share."""
    num_parameters: int
    changing_buffers: tuple[str, ...] = ()
    """Names of the buffers that the forward changes in training."""
    buffer_rules: tuple[Rule, ...] = ()
    """Per changing buffer how the values of the slots are combined."""
    unused_parameters: bool = False
    uses_non_torch_rng: bool = False
    """Whether the model or the loss draws from Python's or NumPy's generators, not only from torch's (dropout …)."""
    loss_reading: str | None = None
    """What the loss's number for a batch means (see `training.objective.Reading`)."""
    classes_last: bool | None = None
    """Whether the classes are the last dimension of the outputs (see `training.objective.Objective`)."""
    logged: tuple[str, ...] = ()
    """Names of the further means that each loss brings."""
    evaluated: tuple[State, ...] = ()
    """What each part of an evaluation gives."""
    figures: tuple[str, ...] = ("loss",)
    """Names of the figures of an evaluation."""
    phases: tuple[Phase, ...] = ()
    """The losses that take turns, step by step; none: one loss."""
    data_digest: str | None = None
    """Of the training set, which each worker compares; None for a user's class, which is compared otherwise."""

    @property
    def backend(self) -> str:
        """What torch calls the library that talks between the workers; NCCL takes one rank a GPU."""
        return "gloo" if self.gpus <= 0.5 else "nccl"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Plan":
        names = {key: tuple(saved.get(key, ())) for key in ("changing_buffers", "logged")}
        phases = tuple(map(Phase.from_dict, saved.get("phases", ())))
        evaluated = tuple(
            State(key, kind, dtype, tuple(shape)) for key, kind, dtype, shape in saved.get("evaluated", ())
        )
        figures, rules = tuple(saved.get("figures", ("loss",))), tuple(map(Rule, saved.get("buffer_rules", ())))
        return cls(
            **{**saved, **names, "evaluated": evaluated, "figures": figures, "buffer_rules": rules, "phases": phases}
        )

    def is_due(self, every: int | str | None, step: int) -> bool:
        """Whether what happens every so many steps, or every "epoch", happens after `step`."""
        if every == "epoch":
            # The step with which an epoch's last sample was spent.
            batch, n, phases = self.batch_size, self.num_samples, len(self.phases) or 1
            rounds, rest = divmod(step, phases)
            return rest == 0 and rounds * batch // n > (rounds - 1) * batch // n
        return isinstance(every, int) and step % every == 0


@dataclass(frozen=True)
class Prepared:
    """A config's objects, built: what the preflight looks at and the export uses."""

    plan: Plan
    model: nn.Module
    train: Data
    evaluate: Data | None
    task: Supervised | OwnTask
    sample: Any
    """A few evaluation (else training) samples as the model takes them: inputs [n, *input_shape], or an own task's batch."""
    understood: str = ""
    """What an own task's numbers were understood to mean, in words."""
    test: Data | None = None
    """The set that is evaluated once, at the end."""
    trained_of_loss: tuple[str, ...] = ()
    """The names of the loss's, or the task's, own parameters, which are trained with the model."""

    @cached_property
    def data_identities(self) -> dict[str, Any]:
        """Digest, number of samples and class names of both data sets; plain values."""
        sets = {"train": self.train, "evaluate": self.evaluate}
        return {key: identity_of(data) for key, data in sets.items() if data is not None}


def filled_spec(config: RunConfig, data: Data) -> dict[str, Any]:
    """The model's spec with `input_shape: null` and `num_outputs: null` taken from the data set, and its `target_scale`."""
    filled, where = dict(config.model), "model"
    scale = target_scale(config, data)
    if scale is not None and filled.get("target_scale") is None:
        filled["target_scale"] = scale
    given: dict[str, tuple[int, ...] | int | None] = {"input_shape": data.input_shape, "num_outputs": data.num_outputs}
    for key, value in given.items():
        if key in filled and filled[key] is None:
            if value is None:
                raise ConfigError(f"{where}.{key}=null: the data set doesn't say; set {where}.{key}=…")
            filled[key] = list(value) if isinstance(value, tuple) else value
    return filled


def build_model(config: RunConfig, data: Data) -> nn.Module:
    """The network with its initial weights, which `seed` alone decides."""
    torch.manual_seed(config.seed)
    with python_and_numpy_seeded(config.seed):
        model = build(filled_spec(config, data), config.trusted_modules, "model")
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model._target_={config.model['_target_']}: gives a {type(model).__name__}, not a torch.nn.Module"
        )
    if any(is_lazy(p) for p in model.parameters()):
        materialize(config, model, data)
    freeze(model, groups_of(config.optimizer), whole=False)
    for name, parameter in model.named_parameters():
        if shares_places(parameter):
            raise ConfigError(
                f"model._target_={config.model['_target_']}: several entries of the parameter {name!r}, of shape "
                f"{list(parameter.shape)}, lie at one place in memory (expand), so that no optimizer can update them; "
                "make the small tensor the parameter and expand it in the forward, or clone it"
            )
    for module, name in owners_of(model).values():
        if module._buffers[name] is not None:
            own_buffer(module, name)  # an expanded buffer could not be written to, and a checkpoint does that
    if not any(p.requires_grad for p in model.parameters()):
        frozen = any(entry.get("freeze") for entry in groups_of(config.optimizer))
        why = " that optimizer.groups leaves unfrozen" if frozen else ""
        raise ConfigError(f"model._target_={config.model['_target_']}: has no parameters to train{why}")
    return model


def check_builds_alike(config: RunConfig, model: nn.Module, data: Data) -> None:
    """Build a user's model once more. Raises ConfigError where it then begins with other weights.

    Each worker builds its own replica, and a later run builds the model again: whatever `seed` doesn't decide differs.
    """
    target = str(config.model["_target_"])
    if target.startswith("descent.") and not builds_anew(target):
        return
    again = build_model(config, data).state_dict()
    for name, value in model.state_dict().items():
        if name not in again or not _equal(value, again[name]):
            raise ConfigError(
                f"model._target_={target}: two models built with seed={config.seed} differ in {name!r}: its __init__ "
                "draws from a generator of its own that nothing seeds (such as np.random.default_rng()), or depends on "
                "the time; draw from torch's, random's or np.random's global generator, or seed the own one"
            )


def _equal(value: Any, other: Any) -> bool:
    if not (isinstance(value, Tensor) and isinstance(other, Tensor)):
        return True  # what get_extra_state gives is no part of a run's state
    return value.shape == other.shape and torch.equal(value.nan_to_num(), other.nan_to_num())


def build_loss(config: RunConfig) -> Any:
    """The loss, an object or a function; what its __init__ draws follows `seed`."""
    target = resolve_target(config.loss["_target_"], config.trusted_modules, "loss._target_")
    with own_generators(seed=config.seed):
        return build_function(with_tensors(config.loss, target), config.trusted_modules, "loss", takes=2)


def build_optimizer_for(config: RunConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the config on this model's parameters."""
    if config.optimizer.get("phases"):
        raise ConfigError("optimizer.phases: this run has no phases, which only a task with the attribute phases has")
    options = {k: v for k, v in config.optimizer.items() if k not in ("_target_", "phases")}
    factory = resolve_target(config.optimizer["_target_"], config.trusted_modules, "optimizer._target_")
    return build_optimizer(model, factory, options, device)


def build_schedule(config: RunConfig, total_steps: int) -> Any:
    """The schedule, with `total_steps: null` filled in."""
    spec = dict(config.schedule)
    if spec.get("total_steps", 0) is None:
        spec["total_steps"] = total_steps
    return build_function(spec, config.trusted_modules, "schedule", takes=1)


def pick_device(config: RunConfig, gpus: float) -> str:
    """`cuda` or `cpu`; `gpus` is what the cluster has. Raises ConfigError for what isn't there."""
    asked = config.resources.gpus
    if config.device == "cuda" and gpus < 1:
        raise ConfigError("device=cuda: the cluster has no GPU; use device=cpu or auto")
    if config.device == "cuda" and asked == 0:
        raise ConfigError("resources.gpus=0: with device=cuda each worker needs one, or a share such as 0.5; use auto")
    device = "cuda" if config.device != "cpu" and gpus >= 1 and asked != 0 else "cpu"
    if asked not in ("auto", 0) and device == "cpu":
        why = "device=cpu takes none" if gpus >= 1 else "the cluster has no GPU to give"
        raise ConfigError(f"resources.gpus={asked:g}: {why}; use auto or 0")
    return device


def _gpus_of_a_worker(config: RunConfig, device: str) -> float:
    if device == "cpu":
        return 0.0
    return 1.0 if config.resources.gpus == "auto" else float(config.resources.gpus)


def has_bf16(device: str) -> bool:
    """Whether the device computes in bfloat16 itself (a CPU that only emulates it is slower than fp32)."""
    if device == "cuda":
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def worker_range(config: RunConfig, *, cores: float, gpus: float, device: str) -> tuple[int, int]:
    """(min, max) workers; `auto` is as many as GPUs or cores have room for, up to the slots (or to 4 with slots=workers)."""
    if isinstance(config.workers, WorkerRange):
        return config.workers.min, config.workers.max
    if config.workers != "auto":
        return 1, int(config.workers)
    if device == "cuda":
        room, limit = int(gpus / _gpus_of_a_worker(config, device) + 1e-9), math.inf
    else:
        room, limit = int(cores / config.resources.cpus), 4
    return 1, max(1, int(min(room, limit if config.slots == "workers" else config.slots)))


def share_out(config: RunConfig, num_samples: int, most: int) -> tuple[int, int]:
    """(global batch, slots) for at most `most` workers. Raises ConfigError for what can't be shared out."""
    batch = num_samples if config.batch.size == "full" else int(config.batch.size)
    slots = most if config.slots == "workers" else int(config.slots)
    if slots < most:
        raise ConfigError(
            f"workers={most}: more than slots={slots}, so a worker would have nothing to do; use slots={most} "
            f"(which changes the result's bits) or workers={slots}"
        )
    if batch < slots:
        each = f" (one for each of {most} workers)" if config.slots == "workers" else ""
        cure = f"workers={batch}" if config.slots == "workers" else f"slots={batch}"
        raise ConfigError(f"batch.size={batch}: smaller than slots={slots}{each}; use {cure} or a larger batch")
    if batch > num_samples:
        raise ConfigError(
            f"batch.size={batch}: the training set has {num_samples} samples; use batch=full or a smaller size"
        )
    return batch, slots


def _one_dtype(config: RunConfig, model: nn.Module) -> None:
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    if (config.reduction == "exact" or config.compress is not None) and len(kinds) > 1:
        wish = "reduction=exact" if config.compress is None else f"compress={config.compress}"
        raise ConfigError(
            f"{wish}: needs all trainable parameters in one dtype, the model has {sorted(map(str, kinds))}; "
            "use reduction=fast and compress=null"
        )


def _check_fp16(config: RunConfig, model: nn.Module) -> None:
    """Raise ConfigError for what doesn't go with a scaled loss."""
    if config.precision != "fp16":
        return
    half = next((n for n, p in model.named_parameters() if p.requires_grad and p.dtype is torch.float16), None)
    if half is not None:
        raise ConfigError(
            f"precision=fp16: the parameter {half!r} is float16 itself, in which small updates are lost; leave the "
            "model in float32, autocast computes in float16"
        )
    if config.compress is not None:
        raise ConfigError(
            f"precision=fp16: compress={config.compress} would keep or round gradients of a scale that changes; use "
            "compress=null, or precision=bf16"
        )


def prepare(config: RunConfig, *, cores: float, gpus: float) -> Prepared:
    """Build everything once and derive the plan; raises for whatever the user has to mend.

    `cores` and `gpus` are what the cluster has in all.
    """
    device = pick_device(config, gpus)
    if config.precision == "bf16" and not has_bf16(device):
        raise ConfigError(f"precision=bf16: the {device} here has no bfloat16 arithmetic; use precision=fp32")
    low, high = worker_range(config, cores=cores, gpus=gpus, device=device)
    own = build_task(config)
    sets = build_sets(config, None if own is None else own.collate)
    train, evaluate = sets.train, sets.evaluate
    batch, slots = share_out(config, len(train), high)
    epoch_order_of(config, train, batch)
    model = build_model(config, train)
    keep_precision(model, train, evaluate, sets.test, *sets.others.values())
    check_builds_alike(config, model, train)
    supervised = None
    if own is not None:
        attach(model, own)
    else:
        supervised = Supervised(_objective(config))
        attach(model, supervised)
    phases = phases_of(own) if own is not None else ()
    if phases:
        check_modules(phases, model, "task")
    rounds = math.ceil(float(config.epochs or 0) * len(train) / batch)
    total = config.steps if config.steps is not None else rounds * (len(phases) or 1)
    largest = -(-batch // slots)
    asked = config.batch.micro_size
    micro = largest if asked == "auto" else min(int(asked), largest)
    _one_dtype(config, model)
    _check_fp16(config, model)
    cpu = torch.device("cpu")
    if phases:
        check_length(build_phased(config, phases, model, lambda of: build_optimizer_for(of, model, cpu)), total)
    else:
        check_length(build_optimizer_for(config, model, cpu), total)
    refuse_unrepeatable(config, train, evaluate)
    check_schedule(config, build_schedule(config, total), total, evaluates=evaluate is not None)
    cut = Cut(batch, slots, micro)
    mixed = config.precision != "fp32" and device == "cpu"  # a GPU's rules are not this machine's
    half = AUTOCAST.get(config.precision, torch.bfloat16)
    with deterministic(config.reduction == "exact"):
        if own is not None:
            own = own.to(cpu, lambda: torch.autocast("cpu", half, enabled=mixed))
            found = (
                check_phases(config, model, own, phases, train, cut)
                if phases
                else check_task(config, model, own, train, cut)
            )
        else:
            assert supervised is not None
            with torch.autocast("cpu", half, enabled=mixed):
                found = _check_supervised(config, model, supervised.objective, train, evaluate, cut)
        held_out = evaluate if evaluate is not None else sets.test
        states, figures = check_evaluation(config, model, found, train, held_out)
    named = [*figures, *(f"{other}/{name}" for other in sets.others for name in figures)]
    check_figures(config, named, evaluate)
    task = found.task
    plan = Plan(
        total_steps=total,
        batch_size=batch,
        num_samples=len(train),
        num_evaluation=len(evaluate) if evaluate is not None else 0,
        steps_per_epoch=max(1, math.ceil(len(train) / batch)) * (len(phases) or 1),
        slots=slots,
        min_workers=low,
        max_workers=high,
        micro_size=micro,
        nominal=1.0 if found.reading is Reading.TOTAL else found.terms * batch,
        threads=max(1, int(config.resources.cpus)),
        device=device,
        gpus=_gpus_of_a_worker(config, device),
        num_parameters=sum(p.numel() for p in model.parameters()),
        changing_buffers=found.changing_buffers,
        buffer_rules=found.buffer_rules,
        unused_parameters=found.unused_parameters,
        uses_non_torch_rng=found.uses_non_torch_rng,
        loss_reading=None if found.reading is None else str(found.reading),
        classes_last=task.objective.classes_last if isinstance(task, Supervised) else None,
        logged=task.logged,
        evaluated=states,
        figures=figures,
        phases=found.phases,
        data_digest=digest_to_compare(train),
    )
    source = evaluate if evaluate is not None else train
    few = read(config, source, np.arange(min(4, len(source))), "data")
    sample = as_pair(few, "data")[0] if own is None else few
    of_loss = tuple(sorted(attached(model)))
    detach(model)
    return Prepared(plan, model, train, evaluate, task, sample, found.understood, sets.test, of_loss)


def _objective(config: RunConfig) -> Objective:
    """The loss of the config, which must come out the same whenever it is built. Raises ConfigError."""
    with own_generators(seed=config.seed):
        objective = Objective.of(build_loss(config))
    refuse_unseeded(objective.as_built, build_loss(config), f"loss._target_={config.loss['_target_']}", config.seed)
    return objective


def _check_supervised(
    config: RunConfig, model: nn.Module, objective: Objective, train: Data, evaluate: Data | None, cut: Cut
) -> Found:
    """A model and a loss on a few samples: what they are and what can't be trained. The model is left as it was."""
    seen = try_one(config, model, objective, train, cut)
    for name, data in (("data.train", train), ("data.evaluate", evaluate)):
        if data is not None:
            check_outputs(config, model, seen.objective, data, name)
    rules = settle_buffers(config, model, seen.changing_buffers, train) if cut.slots > 1 else ()
    loss = settle_loss(config, model, seen, train, cut.micro, whole=cut.whole)
    return Found(
        Supervised(loss.objective),
        seen.changing_buffers,
        rules,
        uses_non_torch_rng=seen.uses_non_torch_rng or loss.uses_non_torch_rng,
        unused_parameters=seen.unused_parameters,
        reading=loss.objective.reading,
        terms=loss.terms,
    )
