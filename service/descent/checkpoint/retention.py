"""Which checkpoints are kept: pure rules, and a deletion that a crash can interrupt anywhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from descent.checkpoint.manifest import MANIFEST, Manifest, read_manifest, step_of
from descent.errors import CheckpointError, StoreError
from descent.storage import Location, open_store


@dataclass(frozen=True)
class Retention:
    """The newest `last`, one per window of `every` steps, and the best by a metric of its evaluation."""

    last: int = 2
    every: int | None = None
    best: str | None = None
    mode: Literal["min", "max"] = "min"


class Pruned(NamedTuple):
    """What `prune` did."""

    deleted: list[str]
    """Names of the folders that it deleted."""
    skipped: list[str]
    """One line on each checkpoint that it passed over because it can't be used, or can't be deleted."""


def to_keep(scores: Mapping[int, float | None], rule: Retention) -> set[int]:
    """The steps to keep. scores: step -> the metric's value, None where it isn't known.

    >>> sorted(to_keep({10: 0.3, 20: 0.1, 30: None, 40: 0.2}, Retention(1, best="eval/loss")))
    [20, 40]
    >>> sorted(to_keep(dict.fromkeys((40, 90, 110, 150, 210)), Retention(1, every=100)))
    [110, 210]
    """
    steps = sorted(scores)
    kept = set(steps[-rule.last :])
    if rule.every is not None:
        windows: dict[int, int] = {}
        for step in steps:  # the first of each window: later checkpoints don't change that
            windows.setdefault(step // rule.every, step)
        kept |= {step for window, step in windows.items() if window > 0}
    known = [(score, step) for step, score in scores.items() if score is not None and score == score]
    if rule.best is not None and known:
        best = max(known) if rule.mode == "max" else min(known, key=lambda k: (k[0], -k[1]))
        kept.add(best[1])
    return kept


def prune(
    root: Location, rule: Retention, *, config_sha256: str | None = None, newest_step: int | None = None
) -> Pruned:
    """Delete the checkpoints that the rule doesn't keep, and unfinished folders older than the newest checkpoint.

    Only checkpoints that can be used count and are deleted: with a valid manifest and all files in
    their sizes, of the given config, and not after `newest_step` (a run that went back leaves such
    behind). The others stay, and take no usable one's place. Without a config, the rule holds for
    the checkpoints of each config that is found.

    The manifest goes first: a crash in between leaves a folder that is no checkpoint, and that the
    next call deletes. What is being written, after the newest checkpoint, is left alone.

    Raises StoreError if `root` can't be listed.
    """
    folders: dict[str, dict[str, int]] = {}
    for entry in open_store(root).list("step-"):
        name, _, rest = entry.key.partition("/")
        if step_of(name) is not None and rest:
            folders.setdefault(name, {})[rest] = entry.size
    by_config: dict[str, dict[int, float | None]] = {}
    skipped = []
    for name, files in folders.items():
        step = step_of(name) or 0
        if MANIFEST in files and (newest_step is None or step <= newest_step):
            try:
                manifest = read_manifest(root / name)
                _check(manifest, files, root / name, config_sha256)
                scores = by_config.setdefault(manifest.config_sha256, {})
                scores[step] = None if rule.best is None else manifest.scalars.get(rule.best)
            except (CheckpointError, StoreError) as error:
                skipped.append(str(error))
    usable = {step for scores in by_config.values() for step in scores}
    if not usable:
        return Pruned([], skipped)
    kept = {step for scores in by_config.values() for step in to_keep(scores, rule)}
    deleted = []
    for name, files in folders.items():
        step = step_of(name) or 0
        unfinished = MANIFEST not in files and step < max(usable)
        if unfinished or (step in usable and step not in kept):
            try:
                delete(root / name, list(files))
                deleted.append(name)
            except StoreError as error:
                skipped.append(str(error))
    return Pruned(sorted(deleted), skipped)


def _check(manifest: Manifest, files: Mapping[str, int], target: Location, config_sha256: str | None) -> None:
    """Raise CheckpointError if a checkpoint is of another config, or a file of it isn't there in its size."""
    if config_sha256 not in (None, manifest.config_sha256):
        raise CheckpointError(f"{target}: is of another run, {manifest.run!r}, with another config")
    for name, entry in manifest.files.items():
        if files.get(name) != entry["size"]:
            raise CheckpointError(f"{target}/{name}: not there with {entry['size']} bytes as the manifest says")


def delete(target: Location, files: list[str] | None = None) -> None:
    """Delete a checkpoint, its manifest first. files: the names in its folder, where they are known."""
    store = open_store(target)
    names = [entry.key for entry in store.list()] if files is None else files
    store.delete(sorted(names, key=lambda name: name != MANIFEST))
    store.tidy(older_than_s=0.0)
