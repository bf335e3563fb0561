"""A model's weights: read from what people have, put into a model, written to a file."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from descent.checkpoint.fit import Rules, fit
from descent.checkpoint.frozen import require_same
from descent.checkpoint.manifest import read_manifest, step_of
from descent.checkpoint.weight_files import model_weights as model_weights
from descent.checkpoint.weight_files import read_parts
from descent.errors import CheckpointError
from descent.storage import Location, open_store

_SHOWN = 5


def read_weights(source: Location) -> dict[str, Tensor]:
    """Name -> tensor, from a file with one set of weights or from a checkpoint's folder; see `weight_files`.

    Raises CheckpointError for anything else, StoreError where disk or server don't let it be read.
    """
    parts = read_parts(source)
    if len(parts) > 1:
        raise CheckpointError(f"{source}: has several sets of weights: {', '.join(parts)}")
    return next(iter(parts.values()))


def put_checkpoint_into(model: nn.Module, target: Location) -> dict[str, Tensor]:
    """Give a model the weights of one of Descent's checkpoints, or of a file with all of them; returns these weights.

    What the checkpoint leaves out because it is frozen, the model must have already. Raises CheckpointError, StoreError.
    """
    weights = _with_frozen(model, read_weights(target), target)
    put_into(model, weights, target, strict=True)
    return weights


def _with_frozen(model: nn.Module, weights: Mapping[str, Tensor], source: Location) -> dict[str, Tensor]:
    """The weights of a checkpoint, with the model's own frozen parameters where the checkpoint goes without them."""
    digest = _frozen_of(source)
    return {**require_same(model, digest, source), **weights} if digest else dict(weights)


def _frozen_of(source: Location) -> str:
    if step_of(source.name) is None:
        return ""
    return read_manifest(source).frozen


@dataclass(frozen=True)
class InitialWeights:
    """Where the weights come from that a run begins with, and how its names become the model's."""

    source: Location
    strict: bool = True
    """Whether every name must have its counterpart."""
    key: str | None = None
    """Which of several state_dicts in a torch file; None: the one that fits best."""
    rules: Sequence[Rules] = ()
    """Beginnings of names and what stands there in the model; see `fit.fit`."""

    def put_into(self, model: nn.Module) -> str | None:
        """Copy the weights into the model. Returns a line on what was chosen and what has no counterpart, or None.

        Raises CheckpointError, StoreError.
        """
        try:
            parts = read_parts(self.source)
            if _frozen_of(self.source):
                parts = {"": _with_frozen(model, parts[""], self.source)}
            fitted = fit(model, parts, key=self.key, rules=self.rules)
        except CheckpointError as error:
            line = str(error)
            raise error if str(self.source) in line else CheckpointError(f"{self.source}: {line}") from error
        unmatched = put_into(model, fitted.weights, self.source, strict=self.strict)
        said = [*fitted.choices, *([unmatched.removeprefix(f"{self.source}: ")] if unmatched else [])]
        return f"{self.source}: {'; '.join(said)}" if said else None


def put_into(model: nn.Module, weights: Mapping[str, Tensor], source: Location, *, strict: bool) -> str | None:
    """Copy weights into a model. Returns a line on the names without a counterpart, or None; see strict.

    Names that the model itself calls unimportant (Hugging Face's `_keys_to_ignore_on_load_…`) and batch norm's counter,
    which the first versions of torch didn't have, may lack a counterpart.

    Raises CheckpointError with the lists of missing, unexpected and misshapen names: with
    strict=True if there is any, with strict=False only if no name fits.
    """
    own = model.state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for name, tensor in own.items():  # a tied weight is there once, under any of its names
        groups.setdefault(id(tensor), []).append(name)
    missing, misshapen, pairs = [], [], []
    for names in groups.values():
        given = next((n for n in names if n in weights), None)
        if given is None:
            if not _unimportant(model, names[0], "missing"):
                missing.append(names[0])
        elif weights[given].shape != own[given].shape:
            misshapen.append(f"{given} {tuple(weights[given].shape)} instead of {tuple(own[given].shape)}")
        else:
            pairs.append((own[given], weights[given]))
    unexpected = sorted(n for n in weights.keys() - own.keys() if not _unimportant(model, n, "unexpected"))
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    line = "; ".join(f"{what}: {_some(names)}" for what, names in lists.items() if names)
    if line and (strict or not pairs):
        hint = "; init_strict=false takes what fits" if pairs else ""
        raise CheckpointError(f"{source}: its weights don't fit this model: {line}{hint}")
    with torch.no_grad():
        for tensor, value in pairs:
            tensor.copy_(value)
    return f"{source}: {len(pairs)} tensors taken; {line}" if line else None


def _unimportant(model: nn.Module, name: str, what: str) -> bool:
    """Whether `name` may be missing, or unexpected, in a file."""
    if what == "missing" and name.endswith("num_batches_tracked"):
        return True
    key = f"_keys_to_ignore_on_load_{what}"
    patterns = (p for module in model.modules() for p in getattr(module, key, None) or ())
    return any(re.search(pattern, name) for pattern in patterns if isinstance(pattern, str))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def write_weights(
    weights: Mapping[str, Tensor], target: Path, metadata: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Write one safetensors file under the module's own names.

    Raises CheckpointError if there is a file already and `overwrite` is not set, StoreError if the disk refuses.
    """
    from safetensors.torch import save

    content = save({n: t.contiguous() for n, t in weights.items()}, dict(metadata))
    store = open_store(target.parent)
    if overwrite:
        store.upload(content, target.name)
    elif not store.put_if_absent(target.name, content):
        raise CheckpointError(f"{target}: is there already; give another name, or delete it first")


def free_parameters(model: nn.Module, keep: Collection[str] = ()) -> Callable[[], None]:
    """Give the memory of a model's parameters back; returns a function that allocates it again.

    For a process that has looked at a model and needs its weights only after the training. The
    parameters stay the same objects, with their shapes and ties; their values are lost, so only
    parameters are freed that `put_into` sets, and `put_into` must follow the allocation.

    keep: names of parameters that `put_into` won't set.
    """
    kept = [tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in keep]
    of_buffers = {b.untyped_storage()._cdata for b in [*model.buffers(), *kept]}
    freed: dict[int, tuple[torch.UntypedStorage, int]] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            if storage._cdata not in of_buffers and storage.resizable():
                freed[storage._cdata] = (storage, storage.nbytes())
    for storage, _ in freed.values():
        storage.resize_(0)

    def allocate() -> None:
        for storage, size in freed.values():
            storage.resize_(size)

    return allocate
