"""Weights of others to begin with: a safetensors or torch file, a checkpoint, on disk or on S3."""

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from descent.checkpoint.reader import read_checkpoint
from descent.errors import CheckpointError, StoreError
from descent.storage import Location, open_store

_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPED = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 5


def read_weights(source: Location) -> dict[str, Tensor]:
    """Name -> tensor, from a .safetensors or torch file or from a checkpoint's folder.

    Torch files are read with weights_only=True: nothing in them runs. Of a checkpoint the
    averaged weights are taken, where it has them.

    Raises CheckpointError for what is none of these, StoreError where it can't be read.
    """
    if source.name.endswith(".safetensors"):
        return _parse_safetensors(_content(source), source)
    if source.name.endswith(_TORCH):
        return _parse_torch(_content(source), source)
    try:
        tensors, _ = read_checkpoint(source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{source}: no weights: neither a .safetensors file, nor one of torch's ({', '.join(_TORCH)}), nor a checkpoint ({error})"
        ) from error
    return model_weights(tensors)


def model_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors -> the module's own names; averages in the place of what they average."""
    plain = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
    averaged = {n.removeprefix("ema/"): t for n, t in tensors.items() if n.startswith("ema/")}
    return plain | averaged


def _content(source: Location) -> bytearray:
    store = open_store(source.parent)
    entry = store.find(source.name)
    if entry is None:
        raise StoreError(f"{source}: there is no such file", kind="missing")
    return store.read(source.name, entry.size)


def _parse_safetensors(content: bytearray, source: Location) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(bytes(content))
    except SafetensorError as error:
        raise CheckpointError(f"{source}: not a whole safetensors file: {error}") from error


def _parse_torch(content: bytearray, source: Location) -> dict[str, Tensor]:
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever it likes
        line = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(
            f"{source}: torch can't read it with weights_only=True, which alone is safe: {line}"
        ) from error
    for name in _WRAPPED:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise CheckpointError(f"{source}: holds no mapping of names to tensors (a state_dict)")
    return {str(name): tensor for name, tensor in found.items()}


def put_into(model: nn.Module, weights: Mapping[str, Tensor], source: Location, *, strict: bool) -> str | None:
    """Copy weights into a model; with strict=False a line on what had no counterpart, or None.

    A prefix that wrappers (DDP, torch.compile) put before every name is taken off.

    Raises CheckpointError with the lists of missing, unexpected and misshapen names: any of
    them with strict=True, and with strict=False when nothing fits.
    """
    weights = _unwrapped(weights, set(model.state_dict()))
    own = model.state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for name, tensor in own.items():  # a tied weight is there once, under any of its names
        groups.setdefault(id(tensor), []).append(name)
    missing, misshapen, pairs = [], [], []
    for names in groups.values():
        given = next((n for n in names if n in weights), None)
        if given is None:
            missing.append(names[0])
        elif weights[given].shape != own[given].shape:
            misshapen.append(f"{given} {tuple(weights[given].shape)} instead of {tuple(own[given].shape)}")
        else:
            pairs.append((own[given], weights[given]))
    unexpected = sorted(weights.keys() - own.keys())
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    line = "; ".join(f"{what}: {_some(names)}" for what, names in lists.items() if names)
    if line and (strict or not pairs):
        hint = "; init_strict=false takes what fits" if pairs else ""
        raise CheckpointError(f"{source}: its weights don't fit this model: {line}{hint}")
    with torch.no_grad():
        for tensor, value in pairs:
            tensor.copy_(value)
    return f"{source}: {len(pairs)} tensors taken; {line}" if line else None


def _unwrapped(weights: Mapping[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if weights and not own & weights.keys() and all(n.startswith(prefix) for n in weights):
            weights = {n.removeprefix(prefix): t for n, t in weights.items()}
    return dict(weights)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def write_weights(weights: Mapping[str, Tensor], target: Path, metadata: Mapping[str, str]) -> None:
    """One safetensors file under the module's own names."""
    from safetensors.torch import save

    content = save({n: t.contiguous() for n, t in weights.items()}, dict(metadata))
    open_store(target.parent).upload(content, target.name)
