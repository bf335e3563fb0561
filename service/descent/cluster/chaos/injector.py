"""Faults injected into a live run at seeded random moments, and the verdict on how the run survived them.

The controller asks in each of its turns which faults to inject, and reports what becomes of them. One fault
at a time: the next is sent only when a step was committed after the last one. The seed decides the kinds,
victims, phases and pauses; when a fault strikes depends on the run, too.
"""

import math
import random
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from descent.config.schema import Chaos as ChaosConfig
from descent.errors import ConfigError
from descent.messages import Fault, Notice, StepRecord

DEADLY = ("kill", "stop", "kill_in_save")
NEED_PEERS = (*DEADLY, "partition")
"""With one worker alone these would test the checkpoint, not the survivors."""
_PHASES = ("step", "forward", "reduce", "update")
_MISSED_S = 120.0
"""A fault that hasn't struck by then won't: there may be no checkpoint to be killed in."""
_AHEAD_S = 1.0
"""A fault is sent this long before its step: a fast run takes hundreds of steps between two of the controller's turns."""
_SECONDS_EACH = 10.0
"""A run whose rest would last less than this for each fault to come is a short one."""


@dataclass
class Strike:
    """One injected fault, from its sending to the next committed step."""

    kind: str
    worker: str
    step: int
    """The last committed step when it was sent."""
    sent: float
    """Unix time, as all times here."""
    generation: int
    struck: bool = False
    resumed_at: int | None = None
    """The committed step with which the first generation after it began."""
    recovered_s: float | None = None
    survived: bool = False

    @property
    def regroups(self) -> bool:
        """Whether it ends its generation."""
        return self.kind in NEED_PEERS


class Chaos:
    """Decides which fault strikes which worker when, and keeps what became of it."""

    def __init__(self, config: ChaosConfig, total_steps: int, first_step: int = 0) -> None:
        self._config = config
        self._random = random.Random(config.seed)
        self._first, self._total = first_step, total_steps
        self._watched: tuple[float, int] | None = None
        """(time, committed step) since which the run was undisturbed."""
        self._steps_per_s = math.inf
        """The speed that was seen last; until one is seen, a run counts as fast."""
        self._kinds = self._draw_kinds()
        self._next: float | None = None
        self.strikes: list[Strike] = []
        self._open: Strike | None = None

    def _draw_kinds(self) -> list[str]:
        """Each kind once in a random order, then by weight."""
        if not self._config.faults:
            return []
        weights = {kind: w for kind, w in self._config.kinds.items() if w > 0}
        once = sorted(weights)
        self._random.shuffle(once)
        rest = max(0, self._config.faults - len(once))
        more = self._random.choices(list(weights), list(weights.values()), k=rest) if rest else []
        return [*once, *more][: self._config.faults]

    @property
    def allowance(self) -> int:
        """How many failures chaos has caused: they don't count towards regroup.max_failures."""
        # A regroup may also need a second try, where the fault came while it was under way.
        return 2 * len(self.strikes)

    def needs_peer(self, committed: int) -> bool:
        """Whether a lone survivor should wait for a replacement, since the run would end before the faults could strike.

        In a longer run the replacement joins in time, and the survivor goes on alone until then.
        """
        to_come = self._kinds[len(self.strikes) :]
        rest_s = (self._total - committed) / self._steps_per_s
        return any(kind in NEED_PEERS for kind in to_come) and rest_s < _SECONDS_EACH * len(to_come)

    def due_faults(
        self,
        now: float,
        members: Sequence[str],
        dead: Collection[str],
        generation: int,
        committed: int,
        settled: bool,
    ) -> list[tuple[str, Fault]]:
        """The faults to inject now, each with its worker.

        now: Unix time. members: of the current generation, by rank. settled: all of them take steps, and
        the run is not recovering from a fault.
        """
        self._follow(now, members, dead, generation, committed)
        self._measure(now, committed, settled)
        count = len(self.strikes)
        if self._open is not None or not settled or count == len(self._kinds):
            return []
        if self._next is None:
            self._next = now + self._random.expovariate(1.0 / self._config.every_s)
        # Sooner where the run would end before all have struck: the faults then share its steps evenly.
        share = (count + 1) / (len(self._kinds) + 1)
        latest = self._first + round(share * (self._total - self._first))
        if now < self._next and committed + _AHEAD_S * self._steps_per_s < latest:
            return []
        # While only one worker is left, until a replacement has joined, the faults that it survives come first.
        fit = [k for k in self._kinds[count:] if len(members) > 1 or k not in NEED_PEERS]
        if not fit:
            return []
        kind = fit[0]
        self._kinds.insert(count, self._kinds.pop(self._kinds.index(kind, count)))
        due, self._next = self._next, None
        worker = members[self._random.randrange(len(members))]
        self._open = Strike(kind, worker, committed, now, generation)
        self.strikes.append(self._open)
        at = committed + 1 if now >= due else max(committed + 1, latest)
        return [(worker, self._fault(kind, at, committed + 1))]

    def _measure(self, now: float, committed: int, settled: bool) -> None:
        if not settled:
            self._watched = None
        elif self._watched is None:
            self._watched = (now, committed)
        elif now - self._watched[0] >= _AHEAD_S / 4:
            self._steps_per_s = max(committed - self._watched[1], 1) / (now - self._watched[0])

    def _fault(self, kind: str, step: int, next_step: int) -> Fault:
        if kind == "kill_in_save":  # the checkpoint is requested now
            step = next_step
            return Fault("kill", step, "save", delay_s=self._random.uniform(0.0, 0.02))
        if kind == "nan":
            return Fault("nan", step, "forward")
        if kind == "slow":
            return Fault("slow", step, seconds=self._random.uniform(0.05, 0.2), count=3)
        phase = self._random.choice(_PHASES)
        # In the middle of what begins with this phase, too.
        delay_s = self._random.choice([0.0, self._random.uniform(0.0, 0.005)])
        return Fault(kind, step, phase, delay_s)

    def _follow(
        self,
        now: float,
        members: Sequence[str],
        dead: Collection[str],
        generation: int,
        committed: int,
    ) -> None:
        strike = self._open
        if strike is None or strike.resumed_at is not None:
            return
        if strike.kind in DEADLY and strike.worker in dead:
            strike.struck = True
            if members and strike.worker not in members:
                strike.resumed_at = committed
        elif strike.struck and strike.regroups and generation > strike.generation:
            strike.resumed_at = committed
        elif not strike.struck and now - strike.sent > _MISSED_S:
            self._open = None

    def struck(self, notice: Notice, worker: str) -> None:
        """A worker that lives on has reported that its fault has struck."""
        strike = self._open
        if strike is None or strike.struck or worker != strike.worker:
            return
        strike.struck, strike.generation = True, notice.generation
        if not strike.regroups:
            strike.resumed_at = notice.step - 1

    def step_committed(self, record: StepRecord) -> None:
        """A step was committed."""
        strike = self._open
        if strike is None or strike.resumed_at is None or record.step <= strike.resumed_at:
            return
        strike.survived = True
        strike.recovered_s = max(0.0, record.time_ms / 1000 - strike.sent)
        self._open = None

    def finished(self, ok: bool) -> None:
        """The run is over; a fault that has struck in its last moments was survived if the run finished."""
        if self._open is not None and self._open.struck:
            self._open.survived = ok

    def verdict(self, steps_lost: int) -> "Verdict | None":
        """How the run survived its faults; None where none was wanted."""
        if not self._config.faults:
            return None
        kinds = {k: [s for s in self.strikes if s.kind == k and s.struck] for k in self._kinds}
        return Verdict(
            wanted=self._config.faults,
            struck=sum(s.struck for s in self.strikes),
            survived=sum(s.survived for s in self.strikes),
            steps_lost=steps_lost,
            kinds={
                kind: KindVerdict(
                    len(found),
                    sum(s.survived for s in found),
                    # What doesn't end a generation needs no recovery.
                    [s.recovered_s for s in found if s.regroups and s.recovered_s is not None],
                )
                for kind, found in kinds.items()
            },
        )


@dataclass(frozen=True)
class KindVerdict:
    """How the run survived one kind of fault."""

    struck: int
    survived: int
    recovered_s: list[float] = field(default_factory=list)
    """From the sending of the fault to the next committed step."""

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"struck": self.struck, "survived": self.survived, **_times(self.recovered_s)}


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


def _times(seconds: list[float]) -> dict[str, float | None]:
    return {
        "recovery_median_s": round(statistics.median(seconds), 3) if seconds else None,
        "recovery_worst_s": round(max(seconds), 3) if seconds else None,
    }


def check(config: ChaosConfig, max_workers: int) -> None:
    """Refuse faults that no worker would survive. Raises ConfigError."""
    asked = [kind for kind in NEED_PEERS if config.kinds.get(kind, 0) > 0]
    if config.faults and asked and max_workers < 2:
        without = " ".join(f"chaos.kinds.{kind}=0" for kind in asked)
        raise ConfigError(
            f"chaos.faults={config.faults}: with one worker a {asked[0]} leaves nobody to go on; use workers=2 "
            f"or more (resources.cpus=0.25 lets several share a core), or {without}"
        )
