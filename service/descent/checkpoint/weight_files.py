"""The files in which people keep weights, read into tensors by name; nothing in a file runs.

    *.safetensors                  one file, or the *.safetensors.index.json of several
    *.pt, *.pth, *.pth.tar, *.bin  torch.save of a state_dict, or of a dict with state_dicts in it
    *.ckpt                         the same: Lightning's checkpoints
    a folder                       one of Descent's checkpoints, Hugging Face's (save_pretrained, the Trainer's
                                   checkpoint-500), or any folder with a single file of weights

What a file is follows from its first bytes, not from its name.
"""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from descent.checkpoint.manifest import MANIFEST, read_manifest
from descent.checkpoint.reader import read_files
from descent.checkpoint.stand_ins import STAND_INS, Array
from descent.errors import CheckpointError, StoreError
from descent.storage import Location, Store, open_store

Parts = dict[str, dict[str, Tensor]]
"""Place in the file ("" for the whole file, "state_dict", "ema.module") -> the tensors there by name."""

_TORCH = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_INDEX = ".index.json"
_BY_OTHERS = {
    ".h5": "Keras",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".gguf": "llama.cpp",
    ".npz": "NumPy",
    ".distcp": "torch.distributed.checkpoint",
}
_BESIDE = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
"""Names of files that the Hugging Face Trainer puts beside the weights."""
_DEEPEST = 4


def is_there(source: Location) -> bool:
    """Whether `source` is a file, or a folder with weights in it. Raises StoreError where the store can't be asked."""
    if isinstance(source, Path):
        return source.is_file() or (source.is_dir() and _file_in(source) is not None)
    return open_store(source.parent).find(source.name) is not None or _file_in(source) is not None


def read_parts(source: Location) -> Parts:
    """Everything in a file or folder that can be a model's weights.

    Of one of Descent's checkpoints only the files with weights are read, and averaged weights (ema.decay) take the
    place of the plain ones.

    Raises CheckpointError for what is none of the forms above, StoreError where disk or server don't let it be read.
    """
    if _is_folder(source):
        name = _file_in(source)
        if name is None:
            raise CheckpointError(f"{source}: no weights in this folder: {_wanted(source)}")
        if name == MANIFEST:
            return {"": _of_checkpoint(source)}
        source = source / name
    if source.name.endswith(_INDEX):
        return {"": _of_several_files(source)}
    return _of_one_file(source)


def model_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights among a checkpoint's tensors, under the module's own names; averages replace what they average."""
    plain = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
    averaged = {n.removeprefix("ema/"): t for n, t in tensors.items() if n.startswith("ema/")}
    return plain | averaged


# -- folders ----------------------------------------------------------------------------


def _is_folder(source: Location) -> bool:
    if isinstance(source, Path):
        return source.is_dir()
    return open_store(source.parent).find(source.name) is None and any(True for _ in open_store(source).list())


def _file_in(folder: Location) -> str | None:
    """The file with a folder's weights (or its index, or manifest); None if there is none.

    Raises CheckpointError where there are several and none is the usual one.
    """
    names = sorted(_files(open_store(folder), folder))
    if MANIFEST in names:
        return MANIFEST
    tensors = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith(_TORCH) and not name.startswith(_BESIDE)]
    indexes = [name for name in names if name.endswith(_INDEX)]
    for usual, found in (("model.safetensors", tensors), ("pytorch_model.bin", pickles)):
        ending = usual.rpartition(".")[2]
        whole = [name for name in indexes if name.endswith(f".{ending}{_INDEX}")]
        for choice in ((usual + _INDEX,), (usual,)):
            if choice[0] in names:
                return choice[0]
        if len(whole) == 1:
            return whole[0]
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            shown = ", ".join(found[:5]) + (", …" if len(found) > 5 else "")
            raise CheckpointError(
                f"{folder}: has several files of weights ({shown}); give one of them: {folder / found[0]}"
            )
    return None


def _files(store: Store, folder: Location) -> Iterator[str]:
    if isinstance(folder, Path):
        yield from (entry.name for entry in folder.iterdir() if entry.is_file())
    else:
        yield from (entry.key for entry in store.list() if "/" not in entry.key)


def _wanted(folder: Location) -> str:
    names = set(_files(open_store(folder), folder))
    if any(name.endswith(".distcp") for name in names):
        return (
            "it is one of torch.distributed.checkpoint, whose index is a pickle; make one file of it: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pt"
        )
    for ending, program in _BY_OTHERS.items():
        if any(name.endswith(ending) for name in names):
            return f"files of {program} are not read; needed is model.safetensors, pytorch_model.bin or {MANIFEST}"
    return f"needed is model.safetensors, pytorch_model.bin, a torch file or {MANIFEST}"


def _of_checkpoint(source: Location) -> dict[str, Tensor]:
    manifest = read_manifest(source)
    names = [name for name in manifest.files if not name.startswith("optimizer-")]
    return model_weights(read_files(source, manifest, names))


def _of_several_files(index: Location) -> dict[str, Tensor]:
    """The tensors of all files that an index names, in the form of Hugging Face: {"weight_map": {name: file}}."""
    try:
        placed = json.loads(open_store(index.parent).get(index.name).decode())["weight_map"]
        files = sorted(set(map(str, placed.values())))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of weights: {error}") from error
    found: dict[str, Tensor] = {}
    for name in files:
        if "/" in name or name.startswith("."):
            raise CheckpointError(f"{index}: names the file {name!r}, which is not beside it")
        found.update(_of_one_file(index.parent / name).get("", {}))
    lost = sorted(set(placed) - found.keys())
    if lost:
        raise CheckpointError(f"{index}: {lost[0]} is not in {placed[lost[0]]}, where the index has it")
    return found


# -- one file ---------------------------------------------------------------------------


def _of_one_file(source: Location) -> Parts:
    store = open_store(source.parent)
    entry = store.find(source.name)
    if entry is None:
        raise StoreError(f"{source}: there is no such file", kind="missing")
    first = store.get_range(source.name, 0, min(16, entry.size))
    if source.name.endswith(".safetensors") or first[8:9] == b"{":
        return {"": _safetensors(source, entry.size)}
    if first[:4] == b"PK\x03\x04" or first[:1] == b"\x80" or source.name.endswith(_TORCH):
        return _torch(source, entry.size, is_zip=first[:2] == b"PK")
    program = next((f"a file of {who}" for end, who in _BY_OTHERS.items() if source.name.endswith(end)), "neither")
    raise CheckpointError(
        f"{source}: no weights that can be read: {program}; it takes a .safetensors file, one of torch's "
        f"({', '.join(_TORCH)}), or a folder of Hugging Face or Descent"
    )


def _safetensors(source: Location, size: int) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        if isinstance(source, Path):
            return load_file(source)
        return load(bytes(open_store(source.parent).read(source.name, size)))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{source}: not a whole safetensors file: {error}") from error


def _torch(source: Location, size: int, *, is_zip: bool) -> Parts:
    def opened() -> Any:
        return source if content is None else io.BytesIO(content)

    # From disk, only the tensors that are used come into memory.
    content = None if isinstance(source, Path) else open_store(source.parent).read(source.name, size)
    with torch.serialization.safe_globals([(cls, name) for name, cls in STAND_INS.items()]):
        try:
            mapped = is_zip and content is None
            loaded = torch.load(opened(), map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # unpickling raises whatever it likes
            raise CheckpointError(f"{source}: {_refusal(source, opened, error)}") from error
    parts = dict(_parts_of(loaded))
    if not parts:
        raise CheckpointError(
            f"{source}: holds no tensors by name (a state_dict), but a {type(loaded).__name__}"
            + (f" with {', '.join(map(str, list(loaded)[:8]))}" if isinstance(loaded, Mapping) else "")
        )
    return parts


def _refusal(source: Location, opened: Any, error: Exception) -> str:
    """Why torch doesn't read a file with weights_only=True, with the names of what it refuses, and the way out."""
    message = " ".join(str(error).split())
    own = "if you trust where the file comes from, write its weights alone, once: "
    if "TorchScript" in message:
        return (
            "is a TorchScript archive, which holds a program, and weights_only=True refuses programs; "
            f"{own}torch.save(torch.jit.load({str(source)!r}).state_dict(), 'weights.pt')"
        )
    names: list[str] = []
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(opened()))
    except Exception:  # an older format, or a damaged file
        if "Unsupported global: GLOBAL " in message:
            names = [message.split("Unsupported global: GLOBAL ")[1].split()[0]]
    if not names:
        _, _, reason = message.partition("WeightsUnpickler error: ")
        reason = reason.partition(" Check the documentation")[0] or message or type(error).__name__
        return f"torch can't read it with weights_only=True, which alone is safe: {reason}"
    return (
        f"torch doesn't read it with weights_only=True, which alone is safe, since it holds objects of "
        f"{', '.join(names)}, and to make those would run code that the file names; {own}"
        f"saved = torch.load({str(source)!r}, map_location='cpu', weights_only=False), then "
        "torch.save(saved['state_dict'], 'weights.pt') with the key that it has, or saved.state_dict() of a whole model"
    )


def _parts_of(loaded: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(place, tensors) of each mapping from names to tensors; what else stands in it is no weight."""
    if not isinstance(loaded, Mapping) or depth > _DEEPEST:
        return
    tensors: dict[str, Tensor] = {}
    for name, value in loaded.items():
        tensor = value.tensor() if isinstance(value, Array) else value
        if isinstance(name, str) and isinstance(tensor, Tensor):
            tensors[name] = tensor
    if tensors:
        yield place, tensors
    for name, value in loaded.items():
        if isinstance(name, str):
            yield from _parts_of(value, f"{place}.{name}" if place else name, depth + 1)
