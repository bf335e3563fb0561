"""Finding, verifying and reading checkpoints."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from descent.checkpoint.manifest import DIGESTS, MANIFEST, Digest, Manifest, partition, read_manifest, step_of
from descent.errors import CheckpointError, StoreError
from descent.storage import Location, Store, open_store
from descent.storage.location import AnyLocation

if TYPE_CHECKING:  # torch takes seconds to import, and looking for a checkpoint doesn't need it
    from torch import Tensor

_QUICK = ("xxh3_128",)
_PARALLEL = 8
_HASHED_AT_ONCE = 1 << 20
_OF_THIS_ONE = ("missing", "damaged", "denied", "key")
"""Kinds of StoreError that say something of one checkpoint, not of the disk or the server as a whole."""

T = TypeVar("T")


class NoCheckpoint(CheckpointError):
    """There is no checkpoint, not even a damaged one."""


# -- finding --------------------------------------------------------------------------


def list_checkpoints(root: AnyLocation) -> list[AnyLocation]:
    """The folders with a manifest under `root`, newest first. Raises StoreError if `root` can't be listed."""
    found = set()
    for entry in open_store(root).list("step-"):
        name, _, rest = entry.key.partition("/")
        step = step_of(name)
        if step is not None and rest == MANIFEST:
            found.add((step, name))
    return [root / name for _, name in sorted(found, reverse=True)]


def newest_checkpoint(
    root: Location,
    config_sha256: str | None = None,
    rescue: Path | None = None,
    rejected: Mapping[str, str] | None = None,
) -> tuple[Location, list[str]]:
    """The newest checkpoint that verifies, and for each newer one that was passed over a line with the reason.

    config_sha256: only checkpoints of this config count.
    rescue: a second folder to look in, see `manifest.rescue_root`.
    rejected: address -> why, for checkpoints that verify and are known to be of no use.

    Raises NoCheckpoint if there is none, CheckpointError if none can be used, StoreError if disk or
    server don't let us look: a run must never start afresh in silence.
    """
    skipped: list[str] = []
    found: list[Location] = [*list_checkpoints(root)]
    if rescue is not None and rescue != root:
        found = sorted([*found, *list_checkpoints(rescue)], key=lambda t: step_of(t.name) or 0, reverse=True)
    for target in found:
        problem = (rejected or {}).get(str(target)) or _problem(target, config_sha256)
        if not problem:
            return target, skipped
        skipped.append(problem)
    if not skipped:
        raise NoCheckpoint(f"{root}: no complete checkpoint")
    raise CheckpointError(f"{root}: no complete checkpoint ({'; '.join(skipped)})")


def _problem(target: Location, config_sha256: str | None) -> str:
    """Why a checkpoint can't be used; "" if it can. Raises StoreError for what concerns all checkpoints."""
    try:
        manifest = verify_checkpoint(target)
    except CheckpointError as error:
        return str(error)
    except StoreError as error:
        if error.kind not in _OF_THIS_ONE:
            raise
        return str(error)
    if config_sha256 not in (None, manifest.config_sha256):
        return f"{target}: is of another run, {manifest.run!r}, with another config"
    return ""


# -- reading --------------------------------------------------------------------------


def read_checkpoint(target: Location) -> tuple[dict[str, "Tensor"], Manifest]:
    """All tensors of a checkpoint on the CPU, sizes and hashes verified; several files are read at a time.

    Raises CheckpointError for a damaged checkpoint, StoreError where disk or server don't let it be read.
    """
    manifest = read_manifest(target)
    return read_files(target, manifest, manifest.files), manifest


def read_files(target: Location, manifest: Manifest, names: Collection[str]) -> dict[str, "Tensor"]:
    """The tensors ("model/…", "optimizer/…", "ema/…") in some of a checkpoint's files; raises like `read_checkpoint`."""
    store = open_store(target)
    tensors: dict[str, Tensor] = {}
    for name, in_file in _for_each(names, lambda n: _read_file(store, n, manifest.files[n], target)):
        group = name.partition("-")[0]
        for inner, tensor in in_file.items():
            if f"{group}/{inner}" in tensors:
                raise CheckpointError(f"{target}/{name}: {inner} is in another file, too")
            tensors[f"{group}/{inner}"] = tensor
    return tensors


def files_of_rank(manifest: Manifest, rank: int, world_size: int) -> list[str]:
    """The files that a rank reads in a restore."""
    return partition({name: entry["size"] for name, entry in manifest.files.items()}, world_size)[rank]


def verify_checkpoint(target: Location, *, thorough: bool = False) -> Manifest:
    """Read all files and compare their hashes; raises like `read_checkpoint`. thorough: SHA-256 too, not XXH3 alone."""
    manifest = read_manifest(target)
    store, kinds = open_store(target), tuple(DIGESTS) if thorough else _QUICK
    _for_each(manifest.files, lambda n: _verified_content(store, n, manifest.files[n], target, kinds))
    return manifest


def _for_each(files: Collection[str], work: Callable[[str], T]) -> list[tuple[str, T]]:
    names = sorted(files)
    with ThreadPoolExecutor(_PARALLEL, "checkpoint") as threads:
        return list(zip(names, threads.map(work, names), strict=True))


def _read_file(store: Store, name: str, entry: dict[str, Any], target: Location) -> dict[str, "Tensor"]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from descent.checkpoint.safetensors_file import tensors_in

    content = _verified_content(store, name, entry, target)
    try:
        # From disk, the pages that were just hashed are mapped: no copy of them is made.
        return load_file(target / name) if isinstance(target, Path) else tensors_in(content)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{target}/{name}: {error}") from error


def _verified_content(
    store: Store, name: str, entry: dict[str, Any], target: Location, kinds: Sequence[str] = _QUICK
) -> bytearray:
    """A file's bytes (none for a local file, which is mapped), once size and hashes are those of the manifest."""
    content = bytearray()
    digests = {kind: DIGESTS[kind]() for kind in kinds}
    try:
        if isinstance(target, Path):
            found = store.find(name)
            if found is None:
                raise CheckpointError(f"{target}/{name}: missing")
            if found.size != entry["size"]:
                raise CheckpointError(f"{target}/{name}: {found.size} bytes, the manifest says {entry['size']}")
            _hash_file(target / name, digests.values())
        else:
            content = store.read(name, entry["size"])
            for digest in digests.values():
                digest.update(content)
    except StoreError as error:
        if error.kind in ("missing", "damaged"):
            raise CheckpointError(str(error)) from error
        raise
    except OSError as error:
        raise CheckpointError(f"{target}/{name}: {error.strerror}") from error
    for kind, digest in digests.items():
        if digest.hexdigest() != entry[kind]:
            raise CheckpointError(f"{target}/{name}: its {kind} is not the manifest's; the file was changed or damaged")
    return content


def _hash_file(path: Path, digests: Collection[Digest]) -> None:
    """Feed a file to the digests, in pieces that are still in the core's cache when they are hashed.

    The kernel reads ahead by itself; threads of our own for that, mapped pages and direct
    reads were tried and are slower.
    """
    piece = memoryview(bytearray(_HASHED_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(piece):
            for digest in digests:
                digest.update(piece[:got])
