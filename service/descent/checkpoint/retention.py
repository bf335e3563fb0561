"""Which checkpoints stay: pure rules, and a deletion that a crash can interrupt anywhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from descent.checkpoint.manifest import MANIFEST, committed, read_manifest, step_of
from descent.errors import CheckpointError
from descent.storage import Location, open_store


@dataclass(frozen=True)
class Retention:
    """The newest `last`, one per window of `every` steps, and the best by a metric of its evaluation."""

    last: int = 2
    every: int | None = None
    best: str | None = None
    mode: Literal["min", "max"] = "min"


def to_keep(scores: Mapping[int, float | None], rule: Retention) -> set[int]:
    """The steps to keep. `scores`: step -> the metric's value, None where it isn't known.

    >>> sorted(to_keep({10: 0.3, 20: 0.1, 30: None, 40: 0.2}, Retention(1, best="eval/loss")))
    [20, 40]
    >>> sorted(to_keep(dict.fromkeys((40, 90, 110, 150, 210)), Retention(1, every=100)))
    [110, 210]
    """
    steps = sorted(scores)
    kept = set(steps[-rule.last :])
    if rule.every is not None:
        windows: dict[int, int] = {}
        for step in steps:  # the first of each window: whatever comes later doesn't change that
            windows.setdefault(step // rule.every, step)
        kept |= {step for window, step in windows.items() if window > 0}
    known = [(score, step) for step, score in scores.items() if score is not None and score == score]
    if rule.best is not None and known:
        best = max(known) if rule.mode == "max" else min(known, key=lambda k: (k[0], -k[1]))
        kept.add(best[1])
    return kept


def prune(root: Location, rule: Retention) -> list[str]:
    """Delete the checkpoints that the rule doesn't keep, and leftovers older than the newest; their names.

    The manifest goes first: a crash in between leaves a folder that doesn't count, and that
    the next call deletes. What is being written, newer than the newest, is left alone.
    """
    complete = {step_of(t.name): t for t in committed(root)}
    if not complete:
        return []
    scores = {step: _score(target, rule) for step, target in complete.items() if step is not None}
    kept, newest = to_keep(scores, rule), max(scores)
    doomed: dict[str, list[str]] = {}
    for entry in open_store(root).list("step-"):
        name, _, rest = entry.key.partition("/")
        step = step_of(name)
        if step is not None and rest and step < newest and step not in kept:
            doomed.setdefault(name, []).append(rest)
    for name, files in doomed.items():
        delete(root / name, files)
    return sorted(doomed)


def delete(target: Location, files: list[str] | None = None) -> None:
    """Delete a checkpoint, its manifest first."""
    store = open_store(target)
    found = [entry.key for entry in store.list()] if files is None else files
    store.delete(sorted(found, key=lambda key: key != MANIFEST))
    store.tidy(older_than_s=0.0)


def _score(target: Location, rule: Retention) -> float | None:
    if rule.best is None:
        return None
    try:
        return read_manifest(target).scalars.get(rule.best)
    except CheckpointError:
        return None
