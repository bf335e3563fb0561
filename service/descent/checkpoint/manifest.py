"""Checkpoints: safetensors files and a JSON manifest that is written last, on disk or on S3.

    checkpoints/step-00000120/
        model-00000-of-00002.safetensors       per rank its share of the parameters and buffers,
        model-00001-of-00002.safetensors       under the module's own names: no Descent needed to read them
        optimizer-00000-of-00002.safetensors   …
        manifest.json                          sizes, hashes, step, config hash; without it nothing here counts

Workers write the files in the background (`saver`) and report them; the controller, which hears
of all, writes the manifest. A folder without a valid manifest does not exist.

Each file has two hashes. XXH3 finds any damage at the speed of memory, and every reading is
checked against it; SHA-256, which any tool can compute and nobody can forge, takes longer than
the disk and is compared when somebody asks for it (`descent checkpoint verify`).
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import xxhash

from descent.errors import CheckpointError, StoreError
from descent.messages import ShareWritten
from descent.storage import Location, Store, open_store, to_location

if TYPE_CHECKING:  # torch takes seconds to import, and looking for a checkpoint doesn't need it
    from torch import Tensor

MANIFEST = "manifest.json"
FORMAT = 3
_STEP = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"([a-z]+)-\d{5}-of-\d{5}\.safetensors")
_PARALLEL = 8
_HASHED_AT_ONCE = 1 << 20


class Digest(Protocol):
    """A hash that is fed piece by piece."""

    def update(self, content: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


DIGESTS: dict[str, Callable[[], Digest]] = {"sha256": hashlib.sha256, "xxh3_128": xxhash.xxh3_128}
"""By their names in the manifest; in the order of `FileWritten`."""
_QUICK = ("xxh3_128",)

P = TypeVar("P", bound=Location)
T = TypeVar("T")


@dataclass(frozen=True)
class Manifest:
    """What makes a folder a checkpoint."""

    format: int
    step: int
    run: str
    config_sha256: str
    files: dict[str, dict[str, Any]]
    """File name -> {"size": bytes, "sha256": hex, "xxh3_128": hex}."""
    scalars: dict[str, float]
    versions: dict[str, str]
    time_ms: int = 0
    """Unix time of the commit."""

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(entry["size"] for entry in self.files.values())


class NoCheckpoint(CheckpointError):
    """There is none, not even a damaged one."""


def folder(run_dir: Path, configured: str | None) -> Location:
    """Where a run's checkpoints lie."""
    return to_location(configured) / run_dir.name if configured else run_dir / "checkpoints"


def rescue_folder(run_dir: Path) -> Path:
    """Where a run's last state goes when it can't be written where its checkpoints belong."""
    return run_dir / "checkpoints"


def step_dir(root: P, step: int) -> P:
    """Where the checkpoint of a step lies under `root`."""
    return root / f"step-{step:08d}"  # type: ignore[return-value]


def step_of(name: str) -> int | None:
    """The step in a folder's name; None for any other folder."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def file_name(group: str, rank: int, world_size: int) -> str:
    """The file for a rank's share of "model", "optimizer" or "ema"."""
    return f"{group}-{rank:05d}-of-{world_size:05d}.safetensors"


def share(tensors: Mapping[str, "Tensor"], rank: int, world_size: int) -> list[str]:
    """The names that `rank` writes, the same on every rank."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    return _dealt(sizes, world_size)[rank]


def _dealt(sizes: Mapping[str, int], hands: int) -> list[list[str]]:
    """Names in so many hands of about the same size: the largest first to whoever has least so far."""
    loads, found = [0] * hands, [list[str]() for _ in range(hands)]
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        least = loads.index(min(loads))
        loads[least] += sizes[name]
        found[least].append(name)
    return [sorted(names) for names in found]


# -- writing --------------------------------------------------------------------------


def commit(root: P, parts: Sequence[ShareWritten], *, run: str, config_sha256: str, time_ms: int = 0) -> P:
    """Write the manifest over parts that are all on disk; from then on the checkpoint exists.

    Raises CheckpointError when a file isn't there as reported, StoreError when disk or server refuse.
    """
    step = parts[0].step
    target = step_dir(root, step)
    store = open_store(target)
    there = {entry.key: entry.size for entry in store.list()}
    written = {f.name: f for part in parts for f in part.files}
    for file in written.values():
        if there.get(file.name) != file.size:
            raise CheckpointError(
                f"{target}/{file.name}: not there with {file.size} bytes as its worker reported; do all nodes share {root}?"
            )
    manifest = Manifest(
        FORMAT,
        step,
        run,
        config_sha256,
        {f.name: {"size": f.size, "sha256": f.sha256, "xxh3_128": f.xxh3_128} for f in written.values()},
        dict(parts[0].scalars),
        {"torch": version("torch"), "descent-service": version("descent-service")},
        time_ms,
    )
    content = _sealed(manifest)
    if not store.put_if_absent(MANIFEST, content):
        # A checkpoint of this step that was passed over (damaged, or of a course that was
        # left): its files have just been overwritten, so its manifest is worth nothing.
        store.delete([MANIFEST])
        if not store.put_if_absent(MANIFEST, content):
            raise CheckpointError(f"{target}: another process is writing checkpoints of this run")
    return target


def _sealed(manifest: Manifest) -> bytes:
    """The manifest as JSON with a hash over itself, so that damage to it shows as well."""
    content = asdict(manifest)
    content["sha256"] = _seal(content)
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# -- reading --------------------------------------------------------------------------


def read_manifest(target: Location) -> Manifest:
    """The manifest of a checkpoint folder. Raises CheckpointError if it has none that is valid,
    StoreError if that can't be found out."""
    try:
        raw = open_store(target).get(MANIFEST)
    except StoreError as error:
        if error.kind == "missing":
            raise CheckpointError(f"{target}: no {MANIFEST}, so no complete checkpoint") from error
        raise
    try:
        return _parsed(json.loads(raw.decode()), target)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError) as error:
        raise CheckpointError(f"{target / MANIFEST}: not a valid manifest: {error}") from error


def _parsed(raw: dict[str, Any], target: Location) -> Manifest:
    assert isinstance(raw, dict), "no object"
    known = raw.get("format") == FORMAT
    assert known, f"format {raw.get('format')!r}, this version reads {FORMAT}"
    seal = raw.pop("sha256", None)
    assert seal == _seal(raw), "its SHA-256 is not its own; it was changed or damaged"
    manifest = Manifest(**raw)
    assert type(manifest.step) is int and target.name == f"step-{manifest.step:08d}", f"of step {manifest.step}"
    assert manifest.files, "no files"
    assert all(type(v) in (int, float) for v in manifest.scalars.values()), manifest.scalars
    for name, entry in manifest.files.items():
        assert _FILE.fullmatch(name), name
        assert type(entry["size"]) is int and entry["size"] > 0, entry
        assert re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]), entry
        assert re.fullmatch(r"[0-9a-f]{32}", entry["xxh3_128"]), entry
    return manifest


def load(target: Location) -> tuple[dict[str, "Tensor"], Manifest]:
    """All tensors of a checkpoint on the CPU, sizes and hashes verified; files are read side by side.

    Raises CheckpointError for a checkpoint that is damaged, StoreError where that can't be found out.
    """
    manifest = read_manifest(target)
    return load_files(target, manifest, manifest.files), manifest


def load_files(target: Location, manifest: Manifest, names: Collection[str]) -> dict[str, "Tensor"]:
    """The tensors in some of a checkpoint's files; raises like `load`."""
    store = open_store(target)
    tensors: dict[str, Tensor] = {}
    for name, found in _each(names, lambda n: _load_file(store, n, manifest.files[n], target)):
        group = _group(name)
        tensors.update({f"{group}/{inner}": tensor for inner, tensor in found.items()})
    return tensors


def shares(manifest: Manifest, world_size: int) -> list[list[str]]:
    """By rank the files that it reads in a restore."""
    return _dealt({name: entry["size"] for name, entry in manifest.files.items()}, world_size)


def verify(target: Location, *, thorough: bool = False) -> Manifest:
    """Read everything and compare; raises like `load`. thorough: SHA-256 too, not XXH3 alone."""
    manifest = read_manifest(target)
    store, which = open_store(target), tuple(DIGESTS) if thorough else _QUICK
    _each(manifest.files, lambda n: _verified(store, n, manifest.files[n], target, which))
    return manifest


def _group(name: str) -> str:
    return name.partition("-")[0]


def _each(files: Collection[str], work: Callable[[str], T]) -> list[tuple[str, T]]:
    names = sorted(files)
    with ThreadPoolExecutor(_PARALLEL, "checkpoint") as threads:
        return list(zip(names, threads.map(work, names), strict=True))


def _load_file(store: Store, name: str, entry: dict[str, Any], target: Location) -> dict[str, "Tensor"]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from descent.checkpoint.safetensors_file import tensors_in

    content = _verified(store, name, entry, target)
    try:
        # From disk, the pages that were just hashed are mapped: no copy of them is made.
        return load_file(target / name) if isinstance(target, Path) else tensors_in(content)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{target}/{name}: {error}") from error


def _verified(
    store: Store, name: str, entry: dict[str, Any], target: Location, which: Sequence[str] = _QUICK
) -> bytearray:
    """A file's bytes (none for a local one, which is mapped), of the right size and hashes."""
    content = bytearray()
    digests = {kind: DIGESTS[kind]() for kind in which}
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


def committed(root: P) -> list[P]:
    """The complete checkpoints under `root`, newest first. Raises StoreError if it can't be looked at."""
    found = set()
    for entry in open_store(root).list("step-"):
        name, _, rest = entry.key.partition("/")
        step = step_of(name)
        if step is not None and rest == MANIFEST:
            found.add((step, name))
    return [root / name for _, name in sorted(found, reverse=True)]  # type: ignore[misc]


def newest(root: Location, config_sha256: str | None = None, rescued: Path | None = None) -> tuple[Location, list[str]]:
    """The newest checkpoint that verifies, and a line on each newer one that doesn't.

    config_sha256: of the config that it must be of.
    rescued: a second folder to look in, see `rescue_folder`.

    Raises NoCheckpoint if there is none, CheckpointError if none is good, StoreError if
    disk or server don't let us look: never a silent fresh start.
    """
    skipped: list[str] = []
    found = committed(root)
    if rescued is not None and rescued != root:
        found = sorted([*found, *committed(rescued)], key=lambda t: t.name, reverse=True)
    for target in found:
        try:
            manifest = verify(target)
            if config_sha256 not in (None, manifest.config_sha256):
                raise CheckpointError(f"{target}: is of another run, {manifest.run!r}, with another config")
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return target, skipped
    if not skipped:
        raise NoCheckpoint(f"{root}: no complete checkpoint")
    raise CheckpointError(f"{root}: no complete checkpoint ({'; '.join(skipped)})")
