"""Going on with a run: which one, from which checkpoint, and whether the config still says the same."""

import copy
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from descent.checkpoint.manifest import MANIFEST, checkpoint_root, read_manifest, rescue_root
from descent.checkpoint.reader import NoCheckpoint, newest_checkpoint, verify_checkpoint
from descent.cluster.control import control_file
from descent.cluster.record import run_log
from descent.cluster.run.console import significant
from descent.cluster.run.left_over import process_died
from descent.cluster.run.result import RunResult
from descent.cluster.run.trust import overrides_to_repeat, refuse_untyped_trust
from descent.config import Composed, RunConfig, compose, flatten, groups, recompose
from descent.config.environment import with_variables
from descent.config.overrides import parse
from descent.config.secrets import MASK
from descent.errors import CheckpointError, ConfigError
from descent.storage import Location, S3Path, to_location

MAY_CHANGE = (
    "steps",
    "epochs",
    "workers",
    "resources",
    "device",
    "evaluate",
    "checkpoint",
    "observers",
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
"""Keys in which a resumed run may differ from what it was: they don't change its mathematics."""


@dataclass(frozen=True)
class Resumed:
    """The run that goes on, and where it goes on from."""

    run_dir: Path
    run_id: str | None
    """The MLflow run; None when the run never reached its tracking server."""
    checkpoint: Location | None
    """None where the run's process died before the first checkpoint: it begins again."""
    step: int
    slots: int
    total_steps: int | None
    """The length that the run had so far; None where an earlier version didn't note it."""
    same_length: bool
    """Whether steps and epochs are what they were."""
    finished: RunResult | None
    """The run's result, if it has reached its last step."""
    config_sha256: str
    """As the run's checkpoints have it, whatever today's version would compute for the same config."""
    data: Mapping[str, Any] | None
    """The identities of the data sets that the run began with; None for a run of an earlier version."""
    frozen: str
    """The digest of the frozen parameters, where the checkpoint goes without them."""
    skipped: tuple[str, ...]
    """A line for each newer checkpoint that could not be used."""
    died: bool
    """Whether the run's last process ended without a word: killed, or lost with its machine."""

    def already_finished(self) -> RunResult:
        """The result of the finished run, marked as such."""
        assert self.finished is not None
        return replace(self.finished, already_finished=True, checkpoint=str(self.checkpoint), step=self.step)


def refuse_other_data(resumed: Resumed, now: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a data set isn't the one that the run began with: its labels may mean other classes.

    now: the identities of the data sets as they are today.
    """
    from descent.data.identity import difference

    for key, before in (resumed.data or {}).items():
        changed = difference(before or {}, now.get(key) or {})
        if changed is not None:
            raise CheckpointError(
                f"resume={resumed.run_dir.name}: data.{key} is not the data set that the run began with: {changed}; put "
                f"the data back as it was, or begin a new run from these weights: init_from={resumed.run_dir.name}"
            )


def config_sha256(config: RunConfig) -> str:
    """A hash over what decides the mathematics of a run."""
    fixed = {k: v for k, v in flatten(config.to_dict()).items() if not _may_change(k)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _may_change(key: str) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in MAY_CHANGE)


def with_implied_length(overrides: Sequence[str]) -> list[str]:
    """For a resume: the new length takes the place of the old one, whichever of the two units that had.

    >>> with_implied_length(["resume=RUN", "steps=20"])
    ['resume=RUN', 'steps=20', 'epochs=null']
    """
    keys = [override.lstrip("+").partition("=")[0] for override in overrides]
    if "resume" not in keys:
        return list(overrides)
    other = {"steps": "epochs", "epochs": "steps"}
    given = [key for key in keys if key in other]
    return [*overrides, *(f"{other[key]}=null" for key in given if other[key] not in given)]


def run_to_resume(config: RunConfig) -> Path | None:
    """The folder of the run that `resume=…` names; None without it. Raises CheckpointError if there is no such run."""
    return run_log.find_run(config.resume, Path(config.output_dir).expanduser()) if config.resume else None


def resume(composed: Composed, run_dir: Path) -> tuple[Composed, Resumed]:
    """The run's own overrides first, then the new ones; refuses what would change its course.

    The caller holds the lock of `run_dir`. Raises CheckpointError naming the keys that disagree,
    or that no checkpoint can be used.
    """
    wanted = composed.config.resume
    assert wanted is not None
    saved = run_log.read_run_file(run_dir)
    merged = _with_saved(composed, saved)
    before, now = flatten(config_of_run(saved, merged).to_dict()), flatten(merged.config.to_dict())
    length = "schedule.total_steps"
    if before.get(length) is None and now.get(length) == (saved.get("plan") or {}).get("total_steps"):
        before[length] = now.get(length)  # the length that the schedule has had all along, written out
    differ = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and not _may_change(k))
    if differ:
        old, new = flatten(saved["config"]), flatten(merged.without_secrets())
        shown = ", ".join(f"{k}={new.get(k)} (the run has {old.get(k, before.get(k))})" for k in differ[:5])
        raise CheckpointError(f"resume={wanted}: the config disagrees in {shown}; leave these out, or start a new run")
    root = checkpoint_root(run_dir, merged.config.checkpoint.dir)
    skipped: list[str] = []
    died = process_died(saved)
    target: Location | None
    if (Path(wanted).expanduser() / MANIFEST).is_file():
        target = Path(wanted).expanduser().resolve()
        verify_checkpoint(target)
    else:
        try:
            target, skipped = newest_checkpoint(root, saved["config_sha256"], rescue_root(run_dir))
        except NoCheckpoint:
            if not died or control_file.had_checkpoint(run_dir):
                raise
            target = None
    step, frozen = 0, ""
    if target is not None:
        manifest = read_manifest(target)
        step, frozen = manifest.step, manifest.frozen
        if manifest.config_sha256 != saved["config_sha256"]:
            raise CheckpointError(f"{target}: belongs to another config than {run_dir.name}")
    kept = replace(merged, config=merged.config.model_copy(update={"name": run_dir.name}))
    return kept, Resumed(
        run_dir=run_dir,
        run_id=saved.get("run_id"),
        checkpoint=target,
        step=step,
        slots=int(saved["slots"]),
        total_steps=(saved.get("plan") or {}).get("total_steps"),
        same_length=all(before.get(key) == now.get(key) for key in ("steps", "epochs")),
        finished=RunResult.from_json(run_dir, saved) if saved.get("state") == "FINISHED" else None,
        config_sha256=saved["config_sha256"],
        data=saved.get("data"),
        frozen=frozen,
        skipped=tuple(skipped),
        died=died,
    )


def _with_saved(composed: Composed, saved: Mapping[str, Any]) -> Composed:
    """What a run was made from, with the new overrides after it."""
    if composed.sources is None:  # a whole RunConfig was given
        return composed
    where = f"resume={composed.config.resume}"
    if saved["overrides"] is not None:
        kept = overrides_to_repeat(saved, composed.overrides, composed.config_dirs, where)
        return compose([*kept, *composed.overrides], composed.config_dirs)
    refuse_untyped_trust(saved, composed.config.trusted_modules, where)
    tree = copy.deepcopy(saved["config"])
    tree["trusted_modules"] = list(composed.config.trusted_modules)
    known = groups(composed.config_dirs)
    for override in parse(composed.overrides, known):
        if override.key in known or override.action == "delete":
            raise ConfigError(
                f"{override}: this run was made from a RunConfig, so a resume can change single keys only; "
                "give the whole RunConfig, with resume set, to change more"
            )
        *path, last = override.path
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = override.value
    return replace(composed, config=recompose(tree), overrides=(), sources=None)


def schedule_change(config: RunConfig, resumed: Resumed, total_steps: int) -> str | None:
    """What another length does to the learning rate, where the schedule follows the run's length; None if nothing."""
    from descent.training.plan import build_schedule

    old = resumed.total_steps
    if old in (None, total_steps) or config.schedule.get("total_steps", 0) is not None:
        return None
    assert old is not None
    step = resumed.step
    before, now = (float(build_schedule(config, total)(step)) for total in (old, total_steps))
    if math.isclose(before, now, rel_tol=0.01, abs_tol=1e-9):
        return None
    rate = float(config.optimizer.get("lr", 1.0))
    unit = "learning rate" if "lr" in config.optimizer else "learning rate's multiplier"
    return (
        f"the run ends at step {total_steps:,} instead of {old:,}, and its schedule with it: at step {step + 1:,} the "
        f"{unit} is {significant(rate * now)} where it would have been {significant(rate * before)}; "
        f"schedule.total_steps={old} keeps the schedule that the run began with"
    )


def config_of_run(saved: Mapping[str, Any], merged: Composed) -> RunConfig:
    """The config that a run was made with, from its run.json.

    run.json shows a value of the environment as `${oc.env:NAME}` and a secret as `***`. `merged` has
    the values of now. Raises CheckpointError if they are not those that the run had.
    """
    same_slots = merged.config.model_copy(update={"slots": saved["config"].get("slots")})
    now, now_shown = merged.config.to_dict(), flatten(merged.without_secrets())
    tree = copy.deepcopy(dict(saved["config"]))
    changed = []
    for key, value in flatten(tree).items():
        if isinstance(value, str | list) and ("${oc.env:" in str(value) or MASK in str(value)):
            *path, last = key.split(".")
            branch, current = tree, now
            for part in path:
                branch, current = branch[part], current.get(part) or {}
            branch[last] = current.get(last)
            if value != now_shown.get(key) or (
                not _may_change(key) and config_sha256(same_slots) != saved["config_sha256"]
            ):
                changed.append(key)
    changed = [key for key in changed if not _may_change(key)]
    if changed:
        shown = ", ".join(f"{key}={now_shown.get(key)}" for key in changed[:5])
        raise CheckpointError(f"resume: {shown}: the run had another value here (from the environment, or a secret)")
    return recompose(tree)


def find_weights(config: RunConfig) -> Location | None:
    """Where `init_from` points: a file or checkpoint on disk or S3, or a run's newest checkpoint.

    Raises CheckpointError or StoreError when there is nothing.
    """
    if config.init_from is None:
        return None
    from descent.checkpoint.weight_files import is_there, read_parts  # torch, for the others, is not needed yet

    where = to_location(config.init_from)
    # Asked for now, while nothing has started that would have to be ended again.
    if is_there(where):
        return where
    if isinstance(where, S3Path):
        raise CheckpointError(f"init_from={where}: there is no such object, and no folder with weights")
    try:
        run_dir = run_log.find_run(config.init_from, Path(config.output_dir).expanduser(), "init_from")
    except CheckpointError as error:
        if where.is_dir():
            read_parts(where)  # says which files it looked for
        if re.fullmatch(r"[\w.-]+/[\w.-]+", config.init_from):
            hint = (
                f"a name of Hugging Face is not downloaded: hf download {config.init_from} --local-dir FOLDER does that"
            )
            raise CheckpointError(f"{error}; {hint}") from None
        raise
    of_run = run_log.read_run_file(run_dir)["config"]["checkpoint"]
    root = checkpoint_root(run_dir, with_variables(of_run["dir"], "checkpoint.dir"))
    return newest_checkpoint(root, rescue=rescue_root(run_dir))[0]
