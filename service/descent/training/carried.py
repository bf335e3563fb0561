"""Finds what a model or a task keeps from one batch to the next, such as the hidden state of a recurrent network.

Samples are shuffled and shared out over workers, so no batch follows another: a state that is carried over is another
one on each worker, and no checkpoint holds it.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from descent.data.batch import Batch, map_tensors
from descent.data.generators import own_generators
from descent.training.model_snapshot import ModelSnapshot

STATELESS = (
    "samples are shuffled and shared out over workers, so that no batch follows another: begin each forward with a new "
    "state (zeros, or a parameter; torch's recurrent layers do so without hx), and let a sample be a longer piece of the "
    "sequence instead"
)
_OF_MODULES = frozenset(vars(nn.Module()))
_DEEPEST = 4
Leaf = tuple[object, object]
"""What tells whether a value has changed, and the value, which is kept alive so that its id stays its own."""


@dataclass(frozen=True)
class Kept:
    """What models and tasks hold in plain attributes, by name; parameters and buffers are not among it."""

    leaves: Mapping[str, Leaf]

    @classmethod
    def of(cls, *owners: object) -> "Kept":
        return cls({name: leaf for owner in owners for name, leaf in _leaves_of(owner)})

    def changed(self, *owners: object) -> dict[str, object]:
        """Name -> value of everything that was set since, in the owners' order."""
        now = Kept.of(*owners).leaves
        return {
            name: leaf[1] for name, leaf in now.items() if name not in self.leaves or self.leaves[name][0] != leaf[0]
        }

    def named(self, *owners: object) -> str:
        """What was set since, for a message."""
        changed = list(self.changed(*owners))
        return repr(changed[0]) if changed else "something else"


def asks_for_state(error: Exception) -> str | None:
    """The argument of a recurrent network's forward that a batch doesn't bring; None for another error."""
    found = re.search(r"missing \d+ required positional arguments?: '(\w+)'", str(error))
    name = found[1] if found is not None and isinstance(error, TypeError) else ""
    return name if re.match(r"(prev_|last_)?(h|hx|h0|hc|hidden|state|memory|mems|carry)(_|s?$|\d|$)", name) else None


def carried_state(
    before: Kept,
    snapshot: ModelSnapshot,
    model: nn.Module,
    task: object,
    batch: Batch,
    num: int,
    forward: Callable[[Batch], Tensor],
    first: Tensor,
) -> str | None:
    """The name of something that holds a value a sample and goes from one batch into the next; None for the usual model.

    before, snapshot: the model and the task before a forward in training on `batch`, of `num` samples, which gave `first`.
    forward: the same forward again. Buffers are then as they were before it.
    """
    if num < 2:  # a dimension of 1 says nothing
        return None
    per_sample = [n for n, v in before.changed(model, task).items() if isinstance(v, Tensor) and num in v.shape]
    late = [n for n, b in model.named_buffers() if n not in snapshot.buffers and num in b.shape]
    for name in snapshot.written(model):
        shape = dict(model.named_buffers())[name].shape
        if shape != snapshot.buffers[name][2].shape and num in shape:
            return name
    written = [n for n in snapshot.written(model) if num in snapshot.buffers[n][2].shape]
    if written:
        found = _follows_rows(snapshot, model, written, batch, num, forward)
        if found is not None:
            return found
    if not per_sample and not late:
        return None
    snapshot.put_back(model)
    again = _again(forward, batch)
    snapshot.put_back(model)
    if again is not None and torch.equal(first.detach().nan_to_num(), again.nan_to_num()):
        return None  # it is only looked at, such as the last attention map
    return (per_sample or late)[0]


def _follows_rows(
    snapshot: ModelSnapshot,
    model: nn.Module,
    names: list[str],
    batch: Batch,
    num: int,
    forward: Callable[[Batch], Tensor],
) -> str | None:
    """The first of these buffers whose entries change places as the samples do."""
    ends = []
    for given in (batch, map_tensors(lambda t: t.flip(0) if t.dim() and len(t) == num else t, batch)):
        snapshot.put_back(model)
        if _again(forward, given) is None:
            return None
        ends.append({name: b.detach().clone() for name, b in model.named_buffers() if name in names})
    snapshot.put_back(model)
    for name in names:
        one, other = (end[name].double() for end in ends)
        for dim in (d for d, size in enumerate(one.shape) if size == num):
            if torch.allclose(one.flip(dim), other, rtol=1e-4) and not torch.allclose(one, other, rtol=1e-4):
                return name
    return None


def _again(forward: Callable[[Batch], Tensor], batch: Batch) -> Tensor | None:
    """What another forward gives; None where that fails."""
    try:
        with torch.no_grad(), own_generators(seed=0):
            return forward(batch).detach()
    except Exception:
        return None


def _leaves_of(owner: object) -> Iterator[tuple[str, Leaf]]:
    if isinstance(owner, nn.Module):
        for prefix, module in owner.named_modules():
            for key, value in vars(module).items():
                if key not in _OF_MODULES and not isinstance(value, nn.Module):
                    yield from _leaves(f"{prefix}.{key}" if prefix else key, value, _DEEPEST)
    elif hasattr(owner, "__dict__"):
        for key, value in vars(owner).items():
            if isinstance(value, nn.Module):
                yield from ((f"{key}.{name}", leaf) for name, leaf in _leaves_of(value))
            else:
                yield from _leaves(key, value, _DEEPEST)


def _leaves(name: str, value: Any, depth: int) -> Iterator[tuple[str, Leaf]]:
    if isinstance(value, nn.Parameter | nn.Module):
        return
    if isinstance(value, Tensor):
        yield name, ((id(value), value._version), value)
    elif isinstance(value, bool | int | float | str | None):
        yield name, (repr(value), value)
    elif depth and isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}[{index}]", item, depth - 1)
    elif depth and isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{name}[{key!r}]", item, depth - 1)
    elif depth and hasattr(value, "__dict__") and type(value).__module__ not in ("builtins", "types", "torch"):
        for key, item in vars(value).items():
            yield from _leaves(f"{name}.{key}", item, depth - 1)
