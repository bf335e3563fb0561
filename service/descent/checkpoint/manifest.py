"""What a checkpoint is: safetensors files, and a JSON manifest that is written last, on disk or on S3.

    checkpoints/step-00000120/
        model-00000-of-00002.safetensors       each rank's share of the parameters and buffers, under
        model-00001-of-00002.safetensors       the module's own names: other programs can read them
        optimizer-00000-of-00002.safetensors   …
        manifest.json                          sizes, hashes, step, config hash

Each rank *writes* its share in the background (`writer`) and reports it; the controller, to which
all ranks report, *commits* the checkpoint by writing the manifest (`commit_checkpoint`). A folder
without a valid manifest is no checkpoint. `reader` finds, verifies and reads checkpoints.

Each file has two hashes. XXH3 finds damage at the speed of memory, and every reading is checked
against it; SHA-256, which any tool can compute and nobody can forge, takes longer than the disk
and is compared on demand (`descent checkpoint verify`).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import xxhash

from descent.errors import CheckpointError, StoreError
from descent.messages import ShareWritten
from descent.storage import Location, open_store, to_location
from descent.storage.location import AnyLocation

MANIFEST = "manifest.json"
FORMAT = 3
_STEP = re.compile(r"step-(\d{8,18})")
_FILE = re.compile(r"([a-z]+)-\d{5}-of-\d{5}\.safetensors")
_LARGEST = 1 << 62
"""No size, step or time in a manifest is above this."""


class Digest(Protocol):
    """A hash that is fed piece by piece."""

    def update(self, content: Any, /) -> None: ...
    def hexdigest(self) -> str: ...


DIGESTS: dict[str, Callable[[], Digest]] = {"sha256": hashlib.sha256, "xxh3_128": xxhash.xxh3_128}
"""By their names in the manifest; in the order of `FileWritten`."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    format: int
    step: int
    run: str
    config_sha256: str
    files: dict[str, dict[str, Any]]
    """File name -> {"size": bytes, "sha256": hex, "xxh3_128": hex}."""
    scalars: dict[str, float]
    versions: dict[str, str]
    time_ms: int = 0
    """Unix time of the commit in milliseconds."""
    frozen: str = ""
    """The digest of the frozen parameters, where the checkpoint goes without them (see `checkpoint.frozen`)."""
    names: str = ""
    """The digest of the names of all tensors (`digest_of_names`); empty in checkpoints of earlier versions.

    An optimizer has no state for a parameter that never had a gradient, so only this tells what must be there.
    """

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(entry["size"] for entry in self.files.values())


# -- places and names -----------------------------------------------------------------


def checkpoint_root(run_dir: Path, configured: str | None) -> Location:
    """The folder of a run's checkpoints. configured: the config's checkpoint.dir, where it is set."""
    return to_location(configured) / run_dir.name if configured else run_dir / "checkpoints"


def rescue_root(run_dir: Path) -> Path:
    """The folder for a run's last checkpoint if its own place can't be written to."""
    return run_dir / "checkpoints"


def step_dir(root: AnyLocation, step: int) -> AnyLocation:
    """The folder of the checkpoint of a step."""
    return root / f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def file_name(group: str, index: int, count: int) -> str:
    """The name of one of `count` files with tensors of a group: "model", "optimizer" or "ema"."""
    return f"{group}-{index:05d}-of-{count:05d}.safetensors"


def partition(sizes: Mapping[str, int], num_parts: int) -> list[list[str]]:
    """Split names into parts of about equal total size, each sorted; the same on every rank.

    The largest goes first, always to the part that is smallest so far.

    >>> partition({"a": 5, "b": 3, "c": 3}, 2)
    [['a'], ['b', 'c']]
    """
    loads, parts = [0] * num_parts, [list[str]() for _ in range(num_parts)]
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        smallest = loads.index(min(loads))
        loads[smallest] += sizes[name]
        parts[smallest].append(name)
    return [sorted(names) for names in parts]


def digest_of_names(names: Iterable[str]) -> str:
    """XXH3 over the sorted names of tensors."""
    return str(xxhash.xxh3_128("\n".join(sorted(names)).encode()).hexdigest())


# -- the manifest ---------------------------------------------------------------------


def commit_checkpoint(
    root: AnyLocation, shares: Sequence[ShareWritten], *, run: str, config_sha256: str, time_ms: int = 0
) -> AnyLocation:
    """Write the manifest over the shares of all ranks; from then on the checkpoint exists. Returns its folder.

    Raises CheckpointError when a file isn't there as its rank reported, StoreError when disk or server refuse.
    """
    step = shares[0].step
    target = step_dir(root, step)
    store = open_store(target)
    actual = {entry.key: entry.size for entry in store.list()}
    written = {f.name: f for share in shares for f in share.files}
    for file in written.values():
        if actual.get(file.name) != file.size:
            raise CheckpointError(
                f"{target}/{file.name}: not there with {file.size} bytes as its worker reported; do all nodes share {root}?"
            )
    manifest = Manifest(
        FORMAT,
        step,
        run,
        config_sha256,
        {f.name: {"size": f.size, "sha256": f.sha256, "xxh3_128": f.xxh3_128} for f in written.values()},
        dict(shares[0].scalars),
        {"torch": version("torch"), "descent-service": version("descent-service")},
        time_ms,
        shares[0].frozen,
        shares[0].names,
    )
    content = _with_seal(manifest)
    if not store.put_if_absent(MANIFEST, content):
        # There was a checkpoint of this step that the run passed over (damaged, or written before
        # the run went back). Its files have just been overwritten, so its manifest is worth nothing.
        store.delete([MANIFEST])
        if not store.put_if_absent(MANIFEST, content):
            raise CheckpointError(f"{target}: another process is writing checkpoints of this run")
    return target


def read_manifest(target: Location) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises CheckpointError if there is no valid one, StoreError if disk or server don't let it be read.
    """
    try:
        raw = open_store(target).get(MANIFEST)
    except StoreError as error:
        if error.kind == "missing":
            raise CheckpointError(f"{target}: no {MANIFEST}, so no complete checkpoint") from error
        raise
    try:
        return _parse(json.loads(raw.decode()), target.name)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{target / MANIFEST}: not a valid manifest: {error}") from error


def _parse(raw: Any, folder: str) -> Manifest:
    """A manifest from its JSON; every value of it is checked, since names and numbers are used later."""
    _require(isinstance(raw, dict), "no object")
    _require(raw.get("format") == FORMAT, f"format {raw.get('format')!r}, this version reads {FORMAT}")
    seal = raw.pop("sha256", None)
    _require(seal == _seal(raw), "its SHA-256 is not its own; it was changed or damaged")
    manifest = Manifest(**raw)
    _require(_is_count(manifest.step) and folder == f"step-{manifest.step:08d}", f"of step {manifest.step}")
    _require(_is_count(manifest.time_ms), f"time_ms {manifest.time_ms!r}")
    for text in (manifest.run, manifest.config_sha256, manifest.frozen, manifest.names, *manifest.versions.values()):
        _require(isinstance(text, str), f"{text!r} is no text")
    for value in manifest.scalars.values():
        _require(type(value) in (int, float), f"scalars: {manifest.scalars}")
    _require(bool(manifest.files), "no files")
    for name, entry in manifest.files.items():
        _require(bool(_FILE.fullmatch(name)), f"{name!r} is no name of a file")
        _require(_is_count(entry["size"]) and entry["size"] > 0, f"{name}: {entry}")
        _require(bool(re.fullmatch(r"[0-9a-f]{64}", entry["sha256"])), f"{name}: {entry}")
        _require(bool(re.fullmatch(r"[0-9a-f]{32}", entry["xxh3_128"])), f"{name}: {entry}")
    return manifest


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _with_seal(manifest: Manifest) -> bytes:
    """The manifest as JSON with a hash over itself, so that damage to the manifest shows as well."""
    content = asdict(manifest)
    for key in ("frozen", "names"):  # earlier versions don't know these keys
        if not content[key]:
            del content[key]
    content["sha256"] = _seal(content)
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
