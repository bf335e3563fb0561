"""A run with injected faults against the same run without: whether the two differ in a single bit.

Each is a `descent train` in a process of its own, so that neither can influence the other, and so that
a fault may kill that process: the run is then resumed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from descent.cluster.chaos import injector
from descent.cluster.chaos.verdict import driver_was_struck
from descent.cluster.record import run_log
from descent.cluster.run.resume import config_of_run, config_sha256
from descent.cluster.run.trust import keys_to_type, overrides_to_repeat
from descent.config import Composed, RunConfig, compose
from descent.config.overrides import shown_override
from descent.errors import ConfigError

DRIVER_WEIGHT = 0.5
"""Of killing the run's own process, which `descent chaos` resumes; `descent train` leaves that out."""
FAULTS, STEPS_EACH = 20, 4
"""Unless chaos.faults says otherwise: so many faults, but at most one in so many steps."""
_TRAIN = "import json, sys; sys.argv[1:] = json.load(sys.stdin); from descent.cli.main import main; main()"
"""The arguments come by stdin: they may hold what other users of the machine must not see in its list of processes."""


@dataclass(frozen=True)
class Reference:
    """The run that nothing disturbed."""

    run_dir: Path
    state_sha256: str


@dataclass(frozen=True)
class ChaosComparison:
    """What came of it."""

    reference: Path
    summary: dict[str, Any]
    """The disturbed run's, as `descent train --json` prints it."""
    equal: bool | None
    """Whether the state's bits and every step's loss are the reference's; None where reduction=fast promises none."""

    @property
    def passed(self) -> bool:
        faults = self.summary.get("chaos", {})
        return (
            self.summary["state"] == "FINISHED"
            and self.equal is not False
            and faults.get("survived") == faults.get("struck")
            and faults.get("struck") != 0
        )

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        run_dir, state = self.summary["run_dir"], self.summary["state"]
        return {
            "passed": self.passed,
            "bits_equal": self.equal,
            "reference": str(self.reference),
            "run_dir": run_dir,
            "state": state,
            **self.summary.get("chaos", {}),
        }


class Ended(Exception):
    """One of the two trainings didn't get as far as a summary; it has said why itself."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def of_run(
    run: str, overrides: Sequence[str], output_dir: Path, config_dirs: Sequence[str] = ()
) -> tuple[Reference, Composed]:
    """A finished run, and how to do it again under chaos. Raises CheckpointError or ConfigError."""
    run_dir = run_log.find_run(run, output_dir, key="RUN")
    saved = run_log.read_run_file(run_dir)
    if saved.get("state") != "FINISHED" or not saved.get("state_sha256"):
        raise ConfigError(
            f"RUN={run}: ended as {saved.get('state') or 'unfinished'}, so there is no result to compare with; "
            "take a finished run, or give overrides instead"
        )
    if saved["overrides"] is None:
        raise ConfigError(f"RUN={run}: was made from a RunConfig, not from overrides; give overrides instead")
    ours = ("name", "slots", "chaos.faults")
    if saved["overrides"] is None:
        raise ConfigError(
            f"RUN={run}: was made from a RunConfig in Python, so it can't be repeated here; give overrides"
        )
    again = overrides_to_repeat(saved, overrides, config_dirs, f"RUN={run}")
    kept = [o for o in again if o.lstrip("+").split("=")[0] not in ours]
    given = [*kept, f"slots={saved['slots']}", *overrides]
    steps = int(saved["plan"]["total_steps"])
    composed = _with_faults(given, config_dirs, f"{run_dir.name}-chaos", steps)
    before = config_of_run(saved, composed).model_copy(update={"slots": saved["slots"]})
    if config_sha256(composed.config) != config_sha256(before):
        raise ConfigError(
            f"{' '.join(map(shown_override, overrides))}: changes the training itself, so its bits can't be "
            f"compared with {run}'s; only what doesn't (workers, spares, regroup, checkpoint, chaos …) may differ"
        )
    return Reference(run_dir, saved["state_sha256"]), composed


def of_overrides(composed: Composed) -> tuple[Reference, Composed]:
    """Train once without faults, with one worker; and how to do it under chaos. Raises ConfigError or Ended."""
    config, dirs = composed.config, composed.config_dirs
    overrides = [o for o in _exact(composed) if not o.lstrip("+").startswith("name=")]
    if config.slots == "workers":
        overrides.append(f"slots={_slots(config)}")
    name = config.name or f"chaos-{time.strftime('%Y%m%d-%H%M%S')}"
    _with_faults(overrides, dirs, name)  # refused now rather than after the reference
    quiet = [
        "workers=1",
        "spares=0",
        "chaos.faults=0",
        f"name={_free(config, f'{name}-reference')}",
    ]
    summary = train([*overrides, *quiet], dirs)
    if summary["state"] != "FINISHED":
        raise Ended(1)
    disturbed = _with_faults(overrides, dirs, name, int(summary["step"]))
    return Reference(Path(summary["run_dir"]), summary["state_sha256"]), disturbed


def _exact(composed: Composed) -> list[str]:
    """The overrides, with reduction=exact unless they say something else."""
    given = any(o.lstrip("+").startswith("reduction=") for o in composed.overrides)
    return [*composed.overrides, *([] if given else ["reduction=exact"])]


def _slots(config: RunConfig) -> int:
    from descent.cluster.workers import ray_cluster
    from descent.training.plan import pick_device, worker_range

    if config.ray.address is not None and config.workers == "auto":
        raise ConfigError(
            "workers=auto: on a cluster, say how many, such as workers=4: the reference must be cut alike"
        )
    device = pick_device(config, 1.0 if config.device == "cuda" else 0.0)
    return worker_range(config, cores=ray_cluster.local_cores(), gpus=1.0, device=device)[1]


def _with_faults(overrides: Sequence[str], dirs: Sequence[str], name: str, total_steps: int | None = None) -> Composed:
    """The training with faults and a name of its own. Raises ConfigError where no worker could survive them.

    total_steps: of the run, where that is known: a short one gets fewer faults, so that all of them strike.
    """
    named = {o.lstrip("+").split("=")[0] for o in overrides}
    count = FAULTS if total_steps is None else max(1, min(FAULTS, total_steps // STEPS_EACH))
    faults = [] if "chaos.faults" in named else [f"chaos.faults={count}"]
    if not named & {"chaos", "chaos.kinds", "chaos.kinds.driver"}:
        faults.append(f"chaos.kinds.driver={DRIVER_WEIGHT}")
    config = compose([*overrides, *faults], dirs).config
    if config.chaos.faults == 0:
        raise ConfigError("chaos.faults=0: nothing to inject; say how many, such as chaos.faults=20")
    injector.check(config.chaos, _most(config))
    return compose([*overrides, *faults, f"name={_free(config, name)}"], dirs)


def _most(config: RunConfig) -> int:
    """The largest number of workers; at most one for each slot."""
    workers = config.workers
    if workers == "auto":
        return int(config.slots)
    return workers if isinstance(workers, int) else workers.max


def _free(config: RunConfig, wanted: str) -> str:
    runs = Path(config.output_dir).expanduser().resolve() / "runs"
    number, name = 1, wanted
    while (runs / name).exists():
        number += 1
        name = f"{wanted}-{number}"
    return name


def under_chaos(reference: Reference, composed: Composed) -> ChaosComparison:
    """Train again with faults and compare. Raises Ended."""
    summary = _train_to_the_end(composed)
    equal: bool | None = None
    if composed.config.reduction == "exact":
        equal = summary["state_sha256"] == reference.state_sha256 and (
            losses(Path(summary["run_dir"])) == losses(reference.run_dir)
        )
    return ChaosComparison(reference.run_dir, summary, equal)


def _train_to_the_end(composed: Composed) -> dict[str, Any]:
    """Train, and resume as often as a fault has killed the run's process. Raises Ended."""
    overrides = [*composed.overrides]
    run_dir = Path(composed.config.output_dir).expanduser().resolve() / "runs" / str(composed.config.name)
    while True:
        try:
            return train(overrides, composed.config_dirs)
        except Ended as ended:
            if ended.exit_code != -signal.SIGKILL or not driver_was_struck(run_dir):
                raise
        # What a run's folder may not decide is given again; all other settings are the run's own.
        again = {*keys_to_type(run_log.read_run_file(run_dir)), "trusted_modules", "output_dir"}
        overrides = [o for o in composed.overrides if o.lstrip("+").partition("=")[0] in again]
        overrides.append(f"resume={run_dir.name}")


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """Each logged step with its loss, in the order of the log."""
    lines = (run_dir / run_log.METRICS_FILE).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [(step, m["train/loss"]) for step, _, m in records if "train/loss" in m]


def train(overrides: Sequence[str], config_dirs: Sequence[str]) -> dict[str, Any]:
    """`descent train --json` in a process of its own; its progress goes to our stderr. Raises Ended."""
    folders = [part for folder in config_dirs for part in ("--config-dir", folder)]
    command = [sys.executable, "-P", "-c", _TRAIN]  # -P: no module of the current folder in place of a library's
    # Without the variable the command would begin anew to set it, and its arguments would be gone.
    environment = {**os.environ, "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0")}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    arguments: str | None = json.dumps(["train", "--json", *folders, *overrides])
    while True:
        try:
            out = process.communicate(arguments)[0]
            break
        except KeyboardInterrupt:
            # The terminal's Ctrl-C has reached the training too: it ends in its own time.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            arguments = None
    lines = out.strip().splitlines()
    if not lines or process.returncode not in (0, 1):
        raise Ended(process.returncode or 1)
    summary = json.loads(lines[-1])
    assert isinstance(summary, dict)
    return summary
