"""Going on with a run: which one, from which checkpoint, and whether the config still says the same."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from descent.checkpoint import manifest as checkpoint
from descent.cluster.record import run_log
from descent.config import Composed, RunConfig, compose, flatten, recompose
from descent.errors import CheckpointError
from descent.storage import Location, S3Path, open_store, to_location

MAY_CHANGE = (
    "steps",
    "epochs",
    "workers",
    "resources",
    "device",
    "evaluate",
    "checkpoint",
    "tracking",
    "diagnostics",
    "regroup",
    "spares",
    "sentinel_every",
    "straggler",
    "chaos",
    "ray",
    "trusted_modules",
    "resume",
    "output_dir",
    "name",
    "data.path",
)
"""Keys in which a resumed run may differ from the run it goes on with: not the mathematics."""


@dataclass(frozen=True)
class Resumed:
    """The run that is gone on with."""

    run_dir: Path
    run_id: str | None
    checkpoint: Location
    step: int
    slots: int
    config_sha256: str
    """As the run's checkpoints have it, whatever today's version would compute for the same config."""
    skipped: tuple[str, ...]


def config_sha256(config: RunConfig) -> str:
    """A hash over what decides the mathematics of a run."""
    fixed = {k: v for k, v in flatten(config.to_dict()).items() if not _may_change(k)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _may_change(key: str) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in MAY_CHANGE)


def with_saved_overrides(composed: Composed) -> tuple[Composed, Resumed | None]:
    """For `resume=…`: the run's own overrides first, then the new ones; refuses what would change its course.

    Raises CheckpointError naming the keys that disagree.
    """
    config = composed.config
    if config.resume is None:
        return composed, None
    run_dir = run_log.find_run(config.resume, Path(config.output_dir).expanduser())
    saved = run_log.read_run_file(run_dir)
    merged = compose(
        [*saved["overrides"], *composed.overrides],
        [*saved.get("config_dirs", ()), *composed.config_dirs],
    )
    before, now = flatten(recompose(saved["config"]).to_dict()), flatten(merged.config.to_dict())
    differ = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and not _may_change(k))
    if differ:
        shown = ", ".join(f"{k}={now.get(k)} (the run has {before.get(k)})" for k in differ[:5])
        raise CheckpointError(
            f"resume={config.resume}: the config disagrees in {shown}; leave these out, or start a new run"
        )
    root = checkpoint.folder(run_dir, merged.config.checkpoint.dir)
    wanted = Path(config.resume).expanduser()
    skipped: list[str] = []
    target: Location
    if (wanted / checkpoint.MANIFEST).is_file():
        target = wanted.resolve()
        checkpoint.verify(target)
    else:
        target, skipped = checkpoint.newest(root, saved["config_sha256"], checkpoint.rescue_folder(run_dir))
    manifest = checkpoint.read_manifest(target)
    if manifest.config_sha256 != saved["config_sha256"]:
        raise CheckpointError(f"{target}: belongs to another config than {run_dir.name}")
    kept = replace(merged, config=merged.config.model_copy(update={"name": run_dir.name}))
    return kept, Resumed(
        run_dir, saved.get("run_id"), target, manifest.step, int(saved["slots"]), saved["config_sha256"], tuple(skipped)
    )


def find_weights(config: RunConfig) -> Location | None:
    """Where `init_from` points: a file or checkpoint on disk or S3, or a run's newest checkpoint.

    Raises CheckpointError or StoreError when there is nothing.
    """
    if config.init_from is None:
        return None
    where = to_location(config.init_from)
    if isinstance(where, S3Path):
        # Asked for now, while nothing has started that would have to be ended again.
        if "." not in where.name:
            checkpoint.read_manifest(where)
        elif open_store(where.parent).find(where.name) is None:
            raise CheckpointError(f"init_from={where}: there is no such object")
        return where
    if where.is_file() or (where / checkpoint.MANIFEST).is_file():
        return where
    run_dir = run_log.find_run(config.init_from, Path(config.output_dir).expanduser(), "init_from")
    of_run = run_log.read_run_file(run_dir)["config"]["checkpoint"]
    root = checkpoint.folder(run_dir, of_run["dir"])
    return checkpoint.newest(root, rescued=checkpoint.rescue_folder(run_dir))[0]
