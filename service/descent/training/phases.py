"""Trainings with several optimizers, such as a GAN's: named phases that take turns.

A phase is one step: a method of the task gives its loss, and its own optimizer updates its own modules, while
the others are frozen. The phases of a round share one batch. So a step of a phase commits, is repeated and is
saved as any other step is.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from descent.config import RunConfig
from descent.data.batch import Batch
from descent.errors import ConfigError
from descent.optim.phased import Phased
from descent.training.objective import Reading
from descent.training.task import OwnTask, Supervised, check_arguments


@dataclass(frozen=True)
class Phase:
    """One of the losses that take turns; plain values, so that a plan holds it."""

    name: str
    """Also that of the task's method."""
    modules: tuple[str, ...]
    """The names of the modules that the phase trains."""
    reading: str | None = None
    """What the phase's bare number means (see `training.objective.Reading`)."""
    logged: tuple[str, ...] = ()
    """Names of the further means that its loss brings."""
    nominal: float = 1.0
    """Loss terms in a global batch."""

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Phase":
        return cls(**{**saved, "modules": tuple(saved["modules"]), "logged": tuple(saved["logged"])})

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that the phase trains, in the model's order."""
        return [p for name, p in model.named_parameters() if _under(name, self.modules)]


def phases_of(task: OwnTask) -> tuple[Phase, ...]:
    """The phases that the task's attribute `phases` names: {name: module or list of modules}. Raises ConfigError."""
    stated = getattr(task.task, "phases", None)
    if stated is None:
        return ()
    if not isinstance(stated, Mapping) or not stated:
        raise ConfigError(
            f"{task.where}: its attribute phases is a {type(stated).__name__}; it must be a dict from the name of a phase, "
            "which is that of a method of the task, to the modules that the phase trains: "
            '{"discriminator": "discriminator", "generator": ["generator"]}'
        )
    phases = []
    for name, modules in stated.items():
        names = (modules,) if isinstance(modules, str) else tuple(modules)
        if not callable(getattr(task.task, str(name), None)):
            raise ConfigError(f"{task.where}: phases names {name!r}, and the task has no method {name}(model, batch)")
        check_arguments(getattr(task.task, name), name, 2, task.where)
        phases.append(Phase(str(name), names))
    return tuple(phases)


def task_in(task: OwnTask, phase: Phase) -> OwnTask:
    """The task whose loss is that of the phase."""
    reading = None if phase.reading is None else Reading(phase.reading)
    functions = {**task.functions, "loss": getattr(task.task, phase.name)}
    return replace(task, functions=functions, reading=reading, names=phase.logged)


def task_between(task: OwnTask, phases: Sequence[Phase]) -> OwnTask:
    """The task as it is evaluated: by its own `evaluate`, else by the losses of all phases, of which the first is `loss`."""
    methods = {phase.name: getattr(task.task, phase.name) for phase in phases}

    def losses(model: nn.Module, batch: Batch) -> dict[str, Any]:
        found = {name: method(model, batch) for name, method in methods.items()}
        values = {name: value["loss"] if isinstance(value, Mapping) else value for name, value in found.items()}
        return {"loss": values[phases[0].name], **values}

    first = task_in(task, phases[0])
    return replace(first, functions={"evaluate": losses, **first.functions}, names=None)


def check_modules(phases: Sequence[Phase], model: nn.Module, where: str) -> None:
    """Raise ConfigError unless each trainable parameter belongs to exactly one phase."""
    known = {name for name, _ in model.named_modules() if name} | {name for name, _ in model.named_parameters()}
    for phase in phases:
        missing = next((name for name in phase.modules if name not in known), None)
        if missing is not None:
            top = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(f"{where}: phases.{phase.name}: the model has no module {missing!r}; it has {top}")
    for name, parameter in model.named_parameters():
        owners = [phase.name for phase in phases if _under(name, phase.modules)]
        if parameter.requires_grad and len(owners) != 1:
            wrong = f"is trained by the phases {' and '.join(owners)}" if owners else "is trained by no phase"
            raise ConfigError(
                f"{where}: the parameter {name!r} {wrong}; each parameter belongs to one phase: change phases, or call "
                "requires_grad_(False) on what stays as it is"
            )


def build_phased(config: RunConfig, phases: Sequence[Phase], model: nn.Module, build: Any) -> Phased:
    """One optimizer a phase, from `optimizer` with the options of `optimizer.phases.NAME` put over it.

    build: makes the optimizer of the model's trainable parameters from such a config.
    """
    options = {key: value for key, value in config.optimizer.items() if key != "phases"}
    of_phases = config.optimizer.get("phases") or {}
    unknown = next((name for name in of_phases if name not in {phase.name for phase in phases}), None)
    if unknown is not None:
        names = ", ".join(phase.name for phase in phases) or "none"
        raise ConfigError(f"optimizer.phases.{unknown}: the task has no such phase; its phases are {names}")
    for name, own in of_phases.items():
        if any(isinstance(entry, Mapping) and entry.get("freeze") for entry in own.get("groups") or ()):
            raise ConfigError(
                f"optimizer.phases.{name}.groups: freeze: true holds for all phases; put it into optimizer.groups"
            )
    made = {}
    for phase in phases:
        with trained_alone(model, phase):
            spec = {**options, **of_phases.get(phase.name, {})}
            made[phase.name] = build(config.model_copy(update={"optimizer": spec}))
    return Phased(made)


@contextmanager
def trained_alone(model: nn.Module, phase: Phase) -> Iterator[None]:
    """Within the block only the parameters of the phase require a gradient."""
    before = {p: p.requires_grad for p in model.parameters()}
    own = set(phase.parameters(model))
    try:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted and parameter in own)
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


@dataclass(frozen=True)
class Turn:
    """What the steps of one phase work with."""

    task: Supervised | OwnTask
    parameters: Sequence[nn.Parameter]
    nominal: float
    """Loss terms in a global batch, if none is ignored."""
    scale: Tensor
    """1 / nominal, a 0-d tensor on the device."""


class Turns:
    """The phases of a training, in turn; most trainings have one, in which nothing is switched."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, all_: Sequence[Turn], names: Sequence[str]):
        """names: of the phases; none where there is one."""
        self._optimizer, self.all, self._names = optimizer, tuple(all_), tuple(names)
        trained = [p for p in model.parameters() if p.requires_grad]
        self._frozen = [[p for p in trained if not any(p is own for own in turn.parameters)] for turn in self.all]
        self.now = self.all[0]

    def batch_number(self, step: int) -> int:
        """Which batch of the sample order a step takes: the phases of a round share one."""
        return (step - 1) // len(self.all) + 1

    def index(self, step: int) -> int:
        """Whose turn a step is."""
        return (step - 1) % len(self.all)

    @contextmanager
    def taken(self, step: int) -> Iterator[None]:
        """Within the block the phase of this step has its turn: the other phases' modules are frozen."""
        if len(self.all) == 1:
            yield
            return
        index = self.index(step)
        assert isinstance(self._optimizer, Phased)
        self.now, self._optimizer.active = self.all[index], self._names[index]
        try:
            for parameter in self._frozen[index]:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in self._frozen[index]:
                parameter.requires_grad_(True)


def _under(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)
