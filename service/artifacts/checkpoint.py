"""Checkpoints: safetensors files and a JSON manifest that is written last.

    checkpoints/step-00000120/
        state-00000-of-00002.safetensors   one file per rank, its share of the tensors
        state-00001-of-00002.safetensors
        manifest.json                      sizes, SHA-256, step, config hash; without it nothing here counts

Workers write the files in the background and report them; the controller, which hears
of all, writes the manifest. A folder without a valid manifest does not exist.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.errors import CheckpointError
from service.messages import PartWritten

if TYPE_CHECKING:  # torch takes seconds to import, and looking for a checkpoint doesn't need it
    from torch import Tensor

MANIFEST = "manifest.json"
FORMAT = 1
_STEP = re.compile(r"^step-(\d{8,})$")


@dataclass(frozen=True)
class Manifest:
    """What makes a folder a checkpoint."""

    format: int
    step: int
    run: str
    config_sha256: str
    files: dict[str, dict[str, Any]]
    """File name -> {"size": bytes, "sha256": hex}."""
    scalars: dict[str, float]
    versions: dict[str, str]


def folder(run_dir: Path, configured: str | None) -> Path:
    """Where a run's checkpoints lie."""
    return (
        Path(configured).expanduser().resolve() / run_dir.name
        if configured
        else run_dir / "checkpoints"
    )


def step_dir(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies under `root`."""
    return root / f"step-{step:08d}"


def _step_of(target: Path) -> int:
    return int(target.name.removeprefix("step-"))


def share(tensors: Mapping[str, "Tensor"], rank: int, world_size: int) -> list[str]:
    """The names that `rank` writes: largest first to whoever has least so far, the same on every rank."""
    loads = [0] * world_size
    mine = []
    for name in sorted(tensors, key=lambda n: (-tensors[n].numel() * tensors[n].element_size(), n)):
        least = loads.index(min(loads))
        loads[least] += tensors[name].numel() * tensors[name].element_size()
        if least == rank:
            mine.append(name)
    return sorted(mine)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Saver:
    """Writes this rank's share from a copy, on a thread of its own; one save at a time."""

    def __init__(self, root: Path, done: Callable[[PartWritten], None]) -> None:
        self.root = root
        self._done = done
        self._thread = ThreadPoolExecutor(1, "saver")
        self._last: Future[None] | None = None

    def save(
        self, tensors: Mapping[str, "Tensor"], *, step: int, rank: int, world_size: int, generation: int,
        scalars: Mapping[str, float],
    ) -> None:  # fmt: skip
        """Copy this rank's share to host memory and return; the write goes on behind."""
        self.wait()  # the copy of the last save is still in memory: never two
        copies = {
            n: tensors[n].detach().to("cpu", copy=True).contiguous()
            for n in share(tensors, rank, world_size)
        }
        part = PartWritten(step, rank, world_size, generation, f"state-{rank:05d}-of-{world_size:05d}.safetensors",
                           0, "", dict(scalars))  # fmt: skip
        self._last = self._thread.submit(self._write, copies, part)

    def _write(self, tensors: dict[str, "Tensor"], part: PartWritten) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        size, digest, problem = 0, "", None
        try:
            target = step_dir(self.root, part.step)
            target.mkdir(parents=True, exist_ok=True)
            # The name carries the generation until it is whole: a rank of an older
            # generation that is still writing can't touch a newer one's file.
            partial = target / f".{part.file}.{part.generation}"
            save_file(tensors, partial)
            _sync(partial)
            size, digest = partial.stat().st_size, _sha256(partial)
            partial.replace(target / part.file)
        except (OSError, SafetensorError) as error:
            problem = f"{type(error).__name__}: {error}"
        self._done(PartWritten(part.step, part.rank, part.world_size, part.generation, part.file, size, digest, part.scalars, problem))  # fmt: skip

    def wait(self) -> None:
        """Until the last save is on disk (or has failed, which its part says)."""
        if self._last is not None:
            self._last.result()


def commit(root: Path, parts: Sequence[PartWritten], *, run: str, config_sha256: str) -> Path:
    """Write the manifest over parts that are all on disk; from then on the checkpoint exists.

    Raises CheckpointError when a file isn't there as reported, OSError when the disk refuses.
    """
    step = parts[0].step
    target = step_dir(root, step)
    for part in parts:
        file = target / part.file
        if not file.is_file() or file.stat().st_size != part.size:
            raise CheckpointError(
                f"{file}: not there with {part.size} bytes as its worker reported; do all nodes share {root}?"
            )
    manifest = Manifest(
        FORMAT, step, run, config_sha256,
        {p.file: {"size": p.size, "sha256": p.sha256} for p in parts},
        dict(parts[0].scalars), {"torch": version("torch"), "descent-service": version("descent-service")},
    )  # fmt: skip
    temporary = target / f".{MANIFEST}"
    temporary.write_text(json.dumps(asdict(manifest), indent=1, sort_keys=True), encoding="utf-8")
    _sync(temporary)
    temporary.replace(target / MANIFEST)
    _sync(target)
    return target


def read_manifest(target: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises CheckpointError if it has none that is valid."""
    path = target / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**raw)
        assert manifest.format == FORMAT, f"format {manifest.format}, this version reads {FORMAT}"
        assert type(manifest.step) is int, manifest.step
        assert target.name == step_dir(target.parent, manifest.step).name, (
            f"of step {manifest.step}"
        )
        assert manifest.files, "no files"
        assert all(type(v) in (int, float) for v in manifest.scalars.values()), manifest.scalars
        for name, entry in manifest.files.items():
            assert re.fullmatch(r"state-\d{5}-of-\d{5}\.safetensors", name), name
            assert isinstance(entry["size"], int) and re.fullmatch(r"[0-9a-f]{64}", entry["sha256"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{target}: no {MANIFEST}, so no complete checkpoint") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"{path}: not a valid manifest: {error}") from error
    return manifest


def load(target: Path) -> tuple[dict[str, "Tensor"], Manifest]:
    """All tensors of a checkpoint on the CPU, sizes and hashes verified. Raises CheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    manifest = read_manifest(target)
    tensors: dict[str, Tensor] = {}
    for name, entry in sorted(manifest.files.items()):
        file = target / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != entry["size"]:
            raise CheckpointError(
                f"{file}: {file.stat().st_size} bytes, the manifest says {entry['size']}"
            )
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(
                f"{file}: its SHA-256 is not the manifest's; the file was changed or damaged"
            )
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {error}") from error
    return tensors, manifest


def committed(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, newest first."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _STEP.match(p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=_step_of, reverse=True)


def newest(root: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that verifies, and a line on each newer one that doesn't.

    Raises CheckpointError if there is none: never a silent fresh start.
    """
    skipped: list[str] = []
    for target in committed(root):
        try:
            load(target)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        return target, skipped
    reason = f" ({'; '.join(skipped)})" if skipped else ""
    raise CheckpointError(f"{root}: no complete checkpoint{reason}")


def prune(root: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints, and leftovers older than those.

    The manifest goes first: a crash in between leaves a folder that doesn't count.
    """
    kept = committed(root)[:keep_last]
    if not kept:
        return
    for path in sorted(root.iterdir()):
        if _STEP.match(path.name) and path not in kept and _step_of(path) < _step_of(kept[0]):
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
