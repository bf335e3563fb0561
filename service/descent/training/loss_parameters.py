"""Parameters of a loss, or of a task, that are trained with the model: a temperature, the centres of classes.

They are put among the model's parameters as "loss.<name>", so that gradients, optimizer, averages and the comparison
of replicas have them. A name with a dot can't be registered by a module itself, so they are known by their names, and
what is exported as the model goes without them.
"""

from collections.abc import Iterator

import torch
from torch import nn

from descent.checkpoint.manifest import read_manifest
from descent.checkpoint.reader import read_files
from descent.errors import CheckpointError
from descent.storage import Location
from descent.training.task import OwnTask, Supervised

LOSS, LOSS_EMA = "loss/", "loss/ema/"
"""What the names of such parameters, and of their averages, begin with in the training state."""
_PREFIX = "loss."


def trained_of(task: Supervised | OwnTask) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of what a loss or a task trains beside the model.

    Of a loss these are all trainable parameters, of a task of the user's those that are its own attributes: the modules
    that a task holds, such as a teacher, stay as they are.
    """
    whole = isinstance(task, Supervised)
    owner = task.objective.loss if isinstance(task, Supervised) else task.task
    if whole and isinstance(owner, nn.Module):
        yield from ((name, p) for name, p in owner.named_parameters() if p.requires_grad)
        return
    for name, value in {**getattr(owner, "__dict__", {}), **getattr(owner, "_parameters", {})}.items():
        if isinstance(value, nn.Parameter) and value.requires_grad:
            yield name, value
        elif whole and isinstance(value, nn.Module):
            yield from ((f"{name}.{inner}", p) for inner, p in value.named_parameters() if p.requires_grad)


def attach(model: nn.Module, task: Supervised | OwnTask) -> None:
    """Let the model have the trained parameters of the loss or the task, which keeps them too, on the model's device."""
    own = {id(parameter): parameter.device for parameter in model.parameters()}
    for name, parameter in trained_of(task):
        if id(parameter) not in own:
            parameter.data = parameter.data.to(next(iter(own.values())))
            model._parameters[_PREFIX + name] = parameter


def attached(model: nn.Module) -> frozenset[str]:
    """The names of the parameters that `attach` put among the model's."""
    return frozenset(name for name in model._parameters if "." in name)


def detach(model: nn.Module) -> None:
    """Take the parameters away again."""
    for name in attached(model):
        del model._parameters[name]


def load_trained(task: Supervised | OwnTask, target: Location) -> None:
    """Give the trained parameters of a loss or a task the values of the checkpoint `target`: the averages, where it has them.

    Raises CheckpointError, StoreError.
    """
    own = dict(trained_of(task))
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
