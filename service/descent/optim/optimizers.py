"""Builds an optimizer from the options of a config, with the fastest kernels of its class.

`parameter_groups.py` makes its groups, `optimizer_state.py` saves and loads its state, and
`muon.py` holds Muon. Other packages import all of this from here.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from descent.errors import ConfigError
from descent.optim.memory_layout import is_dense
from descent.optim.modes import to_training
from descent.optim.muon import MuonWithAdamW
from descent.optim.optimizer_state import check_saveable, load_named_state, named_state, remember_options
from descent.optim.parameter_groups import FROM_STEP, Override, as_tuple, groups_of, number, parameter_groups, shown

__all__ = [
    "MuonWithAdamW",
    "build_optimizer",
    "load_named_state",
    "named_state",
    "parameter_groups",
]

Factory = Callable[..., torch.optim.Optimizer]

_OF_THE_RUN = ("decay_norm_and_bias", "groups")  # options of Descent, not of an optimizer class
_KERNELS = ("fused", "foreach", "capturable", "differentiable")  # options of an optimizer, not of a group


def build_optimizer(
    model: nn.Module, factory: Factory, options: Mapping[str, Any], device: torch.device
) -> torch.optim.Optimizer:
    """An optimizer for a model whose parameters are on `device`, with the fastest kernels of its class.

    Args:
        factory: the class, as `config.resolve_target` returned it.
        options: the other keys of the config: lr, weight_decay, decay_norm_and_bias, groups,
            and any argument of the class; lists become tuples.

    Each group keeps its learning rate as `initial_lr`, which the schedule multiplies; torch's
    schedulers use the same key.

    Raises ConfigError for an unknown option (with the most similar valid one), for a value that
    the class refuses, and for an optimizer that needs more than one gradient per step.
    """
    lr = number("optimizer.lr", options.get("lr"))
    decay = number("optimizer.weight_decay", options.get("weight_decay", 0.0))
    decay_all = options.get("decay_norm_and_bias", False)
    if not isinstance(decay_all, bool):
        raise ConfigError(f"optimizer.decay_norm_and_bias={shown(decay_all)}: must be true or false")
    entries = groups_of(options)
    own = {k: as_tuple(v) for k, v in options.items() if k not in _OF_THE_RUN}
    probe = _checked(factory, own)
    groups = parameter_groups(model, lr, decay, decay_norm_and_bias=decay_all, groups=entries)
    for index, entry in enumerate(entries):
        _check_override(factory, own, probe, Override(index, entry), lr)
    if "weight_decay" not in probe.defaults:
        for group in groups:
            group.pop("weight_decay")
    if isinstance(factory, type) and issubclass(factory, MuonWithAdamW):
        groups = factory.split(model, groups)
    dtypes = sorted({p.dtype for p in model.parameters() if p.requires_grad}, key=str)
    gaps = next((n for n, p in model.named_parameters() if p.requires_grad and not is_dense(p)), None)
    if gaps is not None and own.get("fused"):
        raise ConfigError(
            f"optimizer.fused=true: torch's fused kernels need parameters without gaps in memory, and {gaps!r} is "
            "a slice of another tensor; leave optimizer.fused out, or clone the slice in the model's __init__"
        )
    try:
        optimizer = factory(groups, **own, **_kernels(factory, own, device, dtypes, dense=gaps is None))
    except (ValueError, RuntimeError) as error:
        # The same options were accepted for a single number, so the parameters are the reason.
        message = f"optimizer._target_={_name(factory)}: refuses this model's parameters: {error}"
        raise ConfigError(message) from error
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    to_training(optimizer)
    remember_options(optimizer)
    return optimizer


def _name(factory: Factory) -> str:
    return getattr(factory, "__name__", str(factory))


def _checked(factory: Factory, own: dict[str, Any]) -> torch.optim.Optimizer:
    """Refuse options that can't work. Returns an optimizer of one number, built with them."""
    name = _name(factory)
    arguments, open_ended = _arguments_of(factory)
    if not open_ended:
        if own.get("weight_decay") == 0 and "weight_decay" not in arguments:
            del own["weight_decay"]  # every config has the key, and 0 needs no support by the class
        for key in own:
            _known(f"optimizer.{key}", key, name, arguments)
    probe = _refusals_named(factory, own, "optimizer")
    if not isinstance(probe, torch.optim.Optimizer):
        given = type(probe).__name__
        raise ConfigError(f"optimizer._target_={name}: gives a {given}, not a torch.optim.Optimizer")
    if "closure" in _required(type(probe).step):
        raise ConfigError(
            f"optimizer._target_={name}: evaluates the loss several times a step, and Descent "
            "computes one gradient per step: use another optimizer"
        )
    try:
        _step_once(probe)
    except Exception as error:
        message = f"optimizer._target_={name}: can't take a step on a dense gradient: {error}"
        raise ConfigError(message) from error
    trial = _refusals_named(factory, own, "optimizer")
    remember_options(trial)
    _refuse_hidden_state(trial, name)
    check_saveable(trial)
    return probe


def _refuse_hidden_state(trial: torch.optim.Optimizer, name: str) -> None:
    """Raise ConfigError for an optimizer that keeps numbers neither in its `state` per parameter nor in its groups."""
    for _ in range(2):  # a flag such as `initialized` changes in the first step
        _step_once(trial, gradient=1.0)
    before = _numbers_of(trial)
    _step_once(trial, gradient=1.0)
    after = _numbers_of(trial)
    changed = [key for key in after if key not in before or not torch.equal(before[key], after[key])]
    own = {id(parameter) for group in trial.param_groups for parameter in group["params"]}
    changed += [f"state[{key!r}]" for key in trial.state if id(key) not in own]
    if changed:
        raise ConfigError(
            f"optimizer._target_={name}: keeps {changed[0]!r} on itself, which changes from step to step and which no "
            "checkpoint holds; keep it in self.state[parameter] or in self.param_groups"
        )


def _numbers_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of the numbers and tensors that are attributes of the optimizer."""
    return {
        key: torch.as_tensor(value).detach().clone()
        for key, value in vars(optimizer).items()
        if isinstance(value, torch.Tensor | bool | int | float) and not key.startswith("_opt_called")
    }


def _check_override(
    factory: Factory,
    own: Mapping[str, Any],
    probe: torch.optim.Optimizer,
    override: Override,
    lr: float,
) -> None:
    """Refuse a value of an override. torch checks only defaults, so the value is tried as a default."""
    settable = [key for key in probe.defaults if key not in _KERNELS]
    for key in override.entry:
        _known(f"{override.where}.{key}", key, _name(factory), [*settable, "lr_scale", FROM_STEP, "freeze"])
    arguments, _ = _arguments_of(factory)
    tried = {k: v for k, v in override.options(lr).items() if k in arguments}
    _refusals_named(factory, {**own, **tried}, override.where)


def _refusals_named(factory: Factory, own: Mapping[str, Any], where: str) -> Any:
    """Build the optimizer on one number; a refusal becomes a ConfigError that names the option."""
    try:
        return factory(_tiny([torch.float32], torch.device("cpu")), **own)
    except Exception as error:
        # An option is refused if the class accepts the others without it.
        refused = [k for k in own if _accepts(factory, {o: v for o, v in own.items() if o != k})]
        settings = ", ".join(f"{where}.{k}={shown(own[k])}" for k in refused) or where
        raise ConfigError(f"{settings}: {_name(factory)} refuses it: {error}") from error


def _accepts(factory: Factory, own: Mapping[str, Any]) -> bool:
    try:
        factory(_tiny([torch.float32], torch.device("cpu")), **own)
    except Exception:
        return False
    return True


def _kernels(
    factory: Factory,
    own: Mapping[str, Any],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    *,
    dense: bool,
) -> dict[str, bool]:
    """{fused: True}, {foreach: True} or {}: the fastest kernels that can update such parameters.

    dense: whether no parameter has gaps in memory. A fused kernel would write into the gaps.

    Only torch's code says whether a class has a fused kernel for a device and dtype, so one step
    is tried. foreach is tried on accelerators only, where it saves kernel launches. On a CPU it
    computes the same bits with more temporary tensors and is up to 4 times slower on large
    layers.
    """
    if any(own.get(key) is not None for key in ("fused", "foreach")) or own.get("differentiable"):
        return {}
    wanted = ["fused"] if device.type == "cpu" else ["fused", "foreach"]
    if not dense:
        wanted.remove("fused")
    arguments, _ = _arguments_of(factory)
    for kernel in wanted:
        if kernel not in arguments:
            continue
        try:
            trial = factory(_tiny(dtypes, device), **own, **{kernel: True})
            _step_once(trial)
        except (RuntimeError, ValueError, NotImplementedError):
            continue
        return {kernel: True}
    return {}


def _step_once(optimizer: torch.optim.Optimizer, gradient: float = 0.0) -> None:
    to_training(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


def _tiny(dtypes: Sequence[torch.dtype], device: torch.device) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(1, 1, dtype=dtype, device=device)) for dtype in dtypes]


def _arguments_of(factory: Factory) -> tuple[list[str], bool]:
    """The names of a class's options (without the parameters), and whether it accepts any others."""
    given = list(inspect.signature(factory).parameters.values())
    open_ended = any(p.kind is p.VAR_KEYWORD for p in given)
    return [p.name for p in given[1:] if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)], open_ended


def _required(function: Callable[..., Any]) -> list[str]:
    return [n for n, p in inspect.signature(function).parameters.items() if p.default is p.empty]


def _known(where: str, key: str, name: str, valid: Sequence[str]) -> None:
    if key not in valid:
        similar = difflib.get_close_matches(key, valid, 1)
        hint = f"did you mean {similar[0]}?" if similar else f"it has {', '.join(valid)}"
        raise ConfigError(f"{where}: {name} has no such option; {hint}")
