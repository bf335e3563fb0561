"""Parameters of a loss, or of a task, that are trained with the model: a temperature, the centres of classes.

They are put among the model's parameters as "loss.<name>", so that gradients, optimizer, averages and the comparison
of replicas have them. A name with a dot can't be registered by a module itself, so they are known by their names, and
what is exported as the model goes without them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from descent.checkpoint.manifest import read_manifest
from descent.checkpoint.reader import read_files
from descent.errors import CheckpointError
from descent.storage import Location

LOSS, LOSS_EMA = "loss/", "loss/ema/"
"""What the names of such parameters, and of their averages, begin with in the training state."""
_PREFIX = "loss."


def trained_of(owner: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of what a loss or a task trains beside the model.

    Of a loss that is a module these are all trainable parameters, of a task those that are its own attributes: the
    modules that a task holds, such as a teacher, stay as they are.
    """
    if isinstance(owner, nn.Module) and not callable(getattr(owner, "loss", None)):
        found = dict(owner.named_parameters())
    else:
        found = {**getattr(owner, "__dict__", {}), **getattr(owner, "_parameters", {})}
    for name, value in found.items():
        if isinstance(value, nn.Parameter) and value.requires_grad:
            yield name, value


def attach(model: nn.Module, owner: Any) -> None:
    """Let the model have the owner's trained parameters; the owner keeps them too."""
    own = {id(parameter) for parameter in model.parameters()}
    for name, parameter in trained_of(owner):
        if id(parameter) not in own:
            model._parameters[_PREFIX + name] = parameter


def attached(model: nn.Module) -> frozenset[str]:
    """The names of the parameters that `attach` put among the model's."""
    return frozenset(name for name in model._parameters if "." in name)


def detach(model: nn.Module) -> None:
    """Take the parameters away again."""
    for name in attached(model):
        del model._parameters[name]


def load_trained(owner: Any, target: Location) -> None:
    """Give the trained parameters of a loss or a task the values of the checkpoint `target`: the averages, where it has them.

    Raises CheckpointError, StoreError.
    """
    own = dict(trained_of(owner))
    if not own:
        return
    manifest = read_manifest(target)
    tensors = read_files(target, manifest, [name for name in manifest.files if name.startswith(LOSS[:-1] + "-")])
    with torch.no_grad():
        for name, parameter in own.items():
            value = tensors.get(LOSS_EMA + name, tensors.get(LOSS + name))
            if value is None:
                raise CheckpointError(f"{target}: has no value for the loss's parameter {name!r}")
            parameter.copy_(value)


def state_name(name: str, attached_names: frozenset[str], prefix: str, prefix_of_loss: str) -> str:
    """The name in the training state of a parameter of the model, or of its average."""
    if name in attached_names:
        return prefix_of_loss + name.removeprefix(_PREFIX)
    return prefix + name
