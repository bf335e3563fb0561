"""Faults injected into a live run at seeded random moments.

The controller asks in each of its turns which faults to inject, and reports what becomes of them. One fault
at a time: the next is sent only when a step was committed after the last one. The seed decides the kinds,
victims, phases and pauses; when a fault strikes depends on the run, too.
"""

import math
import random
from collections.abc import Collection, Sequence

from descent.cluster.chaos.verdict import DEADLY, NEED_PEERS, Strike, StrikeFile, Verdict, verdict_on
from descent.config.schema import CLUSTER_KINDS
from descent.config.schema import Chaos as ChaosConfig
from descent.errors import ConfigError
from descent.messages import Fault, Notice, StepRecord

_PHASES = ("step", "forward", "reduce", "update")
_MISSED_S = 120.0
"""A fault that hasn't struck by then won't: there may be no checkpoint to be killed in."""
_AHEAD_S = 1.0
"""A fault is sent this long before its step: a fast run takes hundreds of steps between two of the controller's turns."""
_SECONDS_EACH = 10.0
"""A run whose rest would last less than this for each fault to come is a short one."""


class Chaos:
    """Decides which fault strikes which worker when, and keeps what became of it."""

    def __init__(
        self,
        config: ChaosConfig,
        total_steps: int,
        first_step: int = 0,
        *,
        killable: Collection[str] = (),
        file: StrikeFile | None = None,
        last_logged: int = 0,
    ) -> None:
        """killable: those of `CLUSTER_KINDS` that may be injected here. file: keeps the strikes.
        last_logged: the last step that the run has logged, which `first_step` may lie before.
        """
        self._config = config
        self._killable = killable
        self._file = file or StrikeFile(None)
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
        if config.faults:
            self._go_on(last_logged)
        self._before = len(self.strikes)
        """Faults that struck in earlier processes of this run."""

    def _go_on(self, last_logged: int) -> None:
        """Take over what earlier processes of this run have injected; the last of these may have been killed by it."""
        found = self._file.read(self._config)
        self.strikes = [strike for strike in found if strike.struck]
        for index, strike in enumerate(self.strikes):
            if strike.kind in self._kinds[index:]:
                self._kinds.insert(index, self._kinds.pop(self._kinds.index(strike.kind, index)))
        if self.strikes:
            self._random.seed(f"{self._config.seed}, {len(self.strikes)}")
        last = self.strikes[-1] if self.strikes else None
        if last is not None and last.kind == "driver" and not last.survived:
            self._open = last
            last.resumed_at = self._first
            last.steps_lost = max(0, max(last.step, last_logged) - self._first)

    def _draw_kinds(self) -> list[str]:
        """Each kind once in a random order, then by weight."""
        if not self._config.faults:
            return []
        weights = {kind: w for kind, w in possible_kinds(self._config, self._killable).items() if w > 0}
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
        share = (count - self._before + 1) / (len(self._kinds) - self._before + 1)
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
        worker = "" if kind in CLUSTER_KINDS else members[self._random.randrange(len(members))]
        self._open = Strike(kind, worker, committed, now, generation, struck=kind == "driver")
        self.strikes.append(self._open)
        if not self._file.write(self._config, self.strikes) and kind == "driver":
            # The next process would not know of it, and kill its driver again and again.
            self._open = None
            self.strikes[-1].struck = False
            return []
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
        if kind in CLUSTER_KINDS:  # every other time while a checkpoint is on its way
            phase = self._random.choice(["step", "save"])
            return Fault(kind, next_step, phase, delay_s=self._random.uniform(0.0, 0.05))
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

    def cluster_lost(self) -> None:
        """A process of the cluster is gone, and the cluster with it."""
        if self._open is not None and self._open.kind in CLUSTER_KINDS:
            self._open.struck = True

    def steps_lost(self, steps: int) -> None:
        """The run goes back to a checkpoint."""
        if self._open is not None:
            self._open.steps_lost += steps

    def step_committed(self, record: StepRecord) -> None:
        """A step was committed."""
        strike = self._open
        if strike is None or strike.resumed_at is None or record.step <= strike.resumed_at:
            return
        strike.survived = True
        strike.recovered_s = max(0.0, record.time_ms / 1000 - strike.sent)
        self._open = None
        self._file.write(self._config, self.strikes)

    def finished(self, ok: bool) -> None:
        """The run is over; a fault that has struck in its last moments was survived if the run finished."""
        if self._open is not None and self._open.struck:
            self._open.survived = ok

    def verdict(self, steps_lost: int) -> Verdict | None:
        """How the run survived its faults; None where none was wanted."""
        if not self._config.faults:
            return None
        return verdict_on(self.strikes, self._config.faults, self._kinds, steps_lost)


def possible_kinds(config: ChaosConfig, killable: Collection[str]) -> dict[str, float]:
    """Kind -> weight, without those processes that must not be killed here."""
    return {kind: w for kind, w in config.kinds.items() if kind not in CLUSTER_KINDS or kind in killable}


def check(config: ChaosConfig, max_workers: int, *, private: bool = True) -> None:
    """Refuse faults that no worker would survive, and those that would strike others. Raises ConfigError.

    private: whether the cluster is the run's own.
    """
    if not config.faults:
        return
    asked = [kind for kind in NEED_PEERS if config.kinds.get(kind, 0) > 0]
    if asked and max_workers < 2:
        without = " ".join(f"chaos.kinds.{kind}=0" for kind in asked)
        raise ConfigError(
            f"chaos.faults={config.faults}: with one worker a {asked[0]} leaves nobody to go on; use workers=2 "
            f"or more (resources.cpus=0.25 lets several share a core), or {without}"
        )
    if not private and not any(possible_kinds(config, ("driver",)).values()):
        raise ConfigError(
            f"chaos.faults={config.faults}: raylet and gcs are killed in a private cluster only, since others may use "
            "the one at ray.address; give another kind a weight, such as chaos.kinds.kill=1"
        )
