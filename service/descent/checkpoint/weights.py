"""A model's weights: read from a safetensors or torch file or a checkpoint, put into a model, written to a file."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from descent.checkpoint.manifest import read_manifest
from descent.checkpoint.reader import read_files
from descent.errors import CheckpointError, StoreError
from descent.storage import Location, open_store

_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPED = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 5


def read_weights(source: Location) -> dict[str, Tensor]:
    """Name -> tensor, from a .safetensors or torch file or from a checkpoint's folder.

    Torch files are read with weights_only=True: nothing in them runs. Of a checkpoint only the files
    with weights are read, and averaged weights (ema.decay) take the place of the plain ones.

    Raises CheckpointError for anything else, StoreError where disk or server don't let it be read.
    """
    if source.name.endswith(".safetensors"):
        return _parse_safetensors(_content(source), source)
    if source.name.endswith(_TORCH):
        return _parse_torch(_content(source), source)
    try:
        manifest = read_manifest(source)
        names = [name for name in manifest.files if not name.startswith("optimizer-")]
        tensors = read_files(source, manifest, names)
    except CheckpointError as error:
        raise CheckpointError(
            f"{source}: no weights: neither a .safetensors file, nor one of torch's ({', '.join(_TORCH)}), nor a checkpoint ({error})"
        ) from error
    return model_weights(tensors)


def model_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights among a checkpoint's tensors, under the module's own names; averages replace what they average."""
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
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever it likes
        line = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(
            f"{source}: torch can't read it with weights_only=True, which alone is safe: {line}"
        ) from error
    for name in _WRAPPED:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
            break
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{source}: holds no mapping of names to tensors (a state_dict)")
    return {str(name): tensor for name, tensor in loaded.items()}


def put_into(model: nn.Module, weights: Mapping[str, Tensor], source: Location, *, strict: bool) -> str | None:
    """Copy weights into a model. Returns a line on the names without a counterpart, or None; see strict.

    A prefix that wrappers (DDP, torch.compile) put before every name is taken off.

    Raises CheckpointError with the lists of missing, unexpected and misshapen names: with
    strict=True if there is any, with strict=False only if no name fits.
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


def free_parameters(model: nn.Module) -> Callable[[], None]:
    """Give the memory of a model's parameters back; returns a function that allocates it again.

    For a process that has looked at a model and needs its weights only after the training. The
    parameters stay the same objects, with their shapes and ties; their values are lost, so only
    parameters are freed that `put_into` sets, and `put_into` must follow the allocation.
    """
    of_buffers = {b.untyped_storage()._cdata for b in model.buffers()}
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
