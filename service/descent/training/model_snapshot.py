"""A model before a forward in training: shows what the forward wrote, and puts the buffers back."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from descent.training.buffers import own_buffer, owners_of
from descent.training.freezing import released_by_itself
from descent.training.sentinel import hash_on_device


@dataclass(frozen=True)
class ModelSnapshot:
    """A model's parameters and buffers as they were before a forward."""

    buffers: dict[str, tuple[int, int, Tensor]]
    """Name -> identity, version, values."""
    parameters: dict[str, Tensor | None]
    """Name -> hash."""
    strides: dict[str, tuple[int, ...]]
    """Name of a parameter -> how it lies in memory."""
    frozen: frozenset[str]
    """Names of the parameters that require no gradient."""

    @classmethod
    def of(cls, model: nn.Module) -> "ModelSnapshot":
        return cls(
            {name: (id(b), b._version, b.clone()) for name, b in model.named_buffers()},
            {name: _hash(p) for name, p in model.named_parameters()},
            {name: p.stride() for name, p in model.named_parameters()},
            frozenset(name for name, p in model.named_parameters() if not p.requires_grad),
        )

    def written(self, model: nn.Module) -> tuple[str, ...]:
        """The buffers that were written or replaced since the snapshot, also where their values stayed the same."""

        def changed(buffer: Tensor, identity: int, version: int, values: Tensor) -> bool:
            # Batch norm's kernel writes without a new version.
            same = (id(buffer), buffer._version) == (identity, version)
            return not (same and torch.equal(buffer, values))

        known = ((n, b) for n, b in model.named_buffers() if n in self.buffers)
        return tuple(name for name, buffer in known if changed(buffer, *self.buffers[name]))

    @torch.no_grad()
    def put_back(self, model: nn.Module) -> None:
        """Give the buffers the values that they had at the snapshot."""
        for name, (module, short) in owners_of(model).items():
            if name in self.buffers:
                own_buffer(module, short).copy_(self.buffers[name][2])

    def objection(self, model: nn.Module, written: Collection[str]) -> str | None:
        """Why this forward can't be repeated by another worker or a later run; None where it can.

        written: the buffers that the forward has written.
        """
        kept = model.state_dict(keep_vars=True)
        for name, parameter in model.named_parameters():
            if _hash(parameter) != self.parameters[name]:
                return (
                    f"its forward writes the parameter {name!r}, from whatever samples it sees, which are "
                    "others on each worker; set it in __init__, or make it a buffer"
                )
            if parameter.stride() != self.strides[name]:
                return (
                    f"its forward changes how the parameter {name!r} lies in memory (memory_format, or .data), after "
                    "gradients and the optimizer's state were laid out like it; do that in __init__"
                )
            if parameter.requires_grad and name in self.frozen:
                return f"in its forward {released_by_itself(name)}"
        for name in written:
            if name not in kept:
                return (
                    f"its forward changes the buffer {name!r}, which is not persistent: no checkpoint holds it "
                    "and no new worker receives it; register it with persistent=True, or, if nothing depends "
                    "on it, keep it as a plain attribute"
                )
        for name, _ in model.named_buffers():
            if name in kept and name not in self.buffers:
                return (
                    f"its first forward registers the buffer {name!r}; do that in __init__, or with "
                    "persistent=False if it is a cache"
                )
        return None


def _hash(parameter: nn.Parameter) -> Tensor | None:
    return hash_on_device([parameter.detach()])
