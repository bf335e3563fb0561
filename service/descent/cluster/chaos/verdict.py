"""What became of injected faults: one strike after the other, kept in the run's folder, and the verdict on all of them."""

import contextlib
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from descent.config.schema import CLUSTER_KINDS
from descent.config.schema import Chaos as ChaosConfig
from descent.storage.atomic import PRIVATE, write_atomic

DEADLY = ("kill", "stop", "kill_in_save")
NEED_PEERS = (*DEADLY, "partition")
"""With one worker alone these would test the checkpoint, not the survivors."""
STRIKES_FILE = "chaos.json"


@dataclass
class Strike:
    """One injected fault, from its sending to the next committed step."""

    kind: str
    worker: str
    """Empty where the fault strikes a process of the cluster, or the driver."""
    step: int
    """The last committed step when it was sent."""
    sent: float
    """Unix time, as all times here."""
    generation: int
    struck: bool = False
    resumed_at: int | None = None
    """The committed step with which the first generation after it began."""
    recovered_s: float | None = None
    steps_lost: int = 0
    """Committed steps that had to be computed again, from a checkpoint."""
    survived: bool = False

    @property
    def regroups(self) -> bool:
        """Whether it ends its generation."""
        return self.kind in (*NEED_PEERS, *CLUSTER_KINDS)


class StrikeFile:
    """The strikes of a run in its folder: a run whose driver was killed goes on with the faults that are still to come.

    folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / STRIKES_FILE if folder is not None else None

    def read(self, config: ChaosConfig) -> list[Strike]:
        """The strikes so far; none where there is no file, or it belongs to other settings of chaos."""
        if self._path is None:
            return []
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            return [Strike(**strike) for strike in content["strikes"]] if content["of"] == _settings(config) else []
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def write(self, config: ChaosConfig, strikes: list[Strike]) -> bool:
        """Keep the strikes; whether the disk took them."""
        if self._path is None:
            return False
        with contextlib.suppress(OSError):
            content = {"of": _settings(config), "strikes": [asdict(strike) for strike in strikes]}
            write_atomic(self._path, json.dumps(content), mode=PRIVATE)
            return True
        return False


def _settings(config: ChaosConfig) -> dict[str, Any]:
    return {"faults": config.faults, "seed": config.seed, "kinds": config.kinds}


def driver_was_struck(run_dir: Path) -> bool:
    """Whether the last fault of this run killed its driver, and no step was committed since."""
    try:
        strikes = json.loads((run_dir / STRIKES_FILE).read_text(encoding="utf-8"))["strikes"]
        return bool(strikes) and strikes[-1]["kind"] == "driver" and not strikes[-1]["survived"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


@dataclass(frozen=True)
class KindVerdict:
    """How the run survived one kind of fault."""

    struck: int
    survived: int
    steps_lost: int = 0
    recovered_s: list[float] = field(default_factory=list)
    """From the sending of the fault to the next step that was committed for the first time."""

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "struck": self.struck,
            "survived": self.survived,
            "steps_lost": self.steps_lost,
            **_times(self.recovered_s),
        }


@dataclass(frozen=True)
class Verdict:
    """How a run survived its faults."""

    wanted: int
    struck: int
    survived: int
    steps_lost: int
    kinds: dict[str, KindVerdict]

    def to_dict(self) -> dict[str, Any]:
        """For `--json` and the run's folder."""
        everything = [t for kind in self.kinds.values() for t in kind.recovered_s]
        return {
            "faults": self.wanted,
            "struck": self.struck,
            "survived": self.survived,
            "steps_lost": self.steps_lost,
            **_times(everything),
            "kinds": {name: kind.to_dict() for name, kind in sorted(self.kinds.items())},
        }


def verdict_on(strikes: list[Strike], wanted: int, kinds: list[str], steps_lost: int) -> Verdict:
    """The verdict on all strikes. kinds: that were to come. steps_lost: by the whole run, for whatever reason."""
    by_kind = {kind: [s for s in strikes if s.kind == kind and s.struck] for kind in kinds}
    return Verdict(
        wanted=wanted,
        struck=sum(s.struck for s in strikes),
        survived=sum(s.survived for s in strikes),
        steps_lost=steps_lost,
        kinds={
            kind: KindVerdict(
                len(found),
                sum(s.survived for s in found),
                sum(s.steps_lost for s in found),
                # What doesn't end a generation needs no recovery.
                [s.recovered_s for s in found if s.regroups and s.recovered_s is not None],
            )
            for kind, found in by_kind.items()
        },
    )


def _times(seconds: list[float]) -> dict[str, float | None]:
    return {
        "recovery_median_s": round(statistics.median(seconds), 3) if seconds else None,
        "recovery_worst_s": round(max(seconds), 3) if seconds else None,
    }
