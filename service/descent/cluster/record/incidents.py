"""What went wrong in a run and what it cost: incidents from their detection to their recovery, and goodput."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from descent.cluster.clock import SYSTEM_CLOCK, Clock
from descent.cluster.record.run_log import RunLog
from descent.config.secrets import masked
from descent.messages import Incident, Notice, StepRecord, WorkerStatus


class IncidentLog:
    """Keeps incidents, in the run's folder and for the listener; each is open until a step is committed again."""

    def __init__(
        self, log: RunLog, notify: Callable[[Incident], None], batch_size: int, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._log, self._notify, self._batch_size, self._clock = log, notify, batch_size, clock
        self._open: list[tuple[int, int]] = []
        """(index of an incident, generations formed when it was opened)."""
        self._formed = 0
        self._resumed_from = 0
        self._noticed: set[tuple[str, int, int | None]] = set()
        self._useful: dict[str, float] = {}
        self.useful_s = 0.0
        self._began = clock.monotonic()

    # -- incidents ----------------------------------------------------------------------

    @property
    def recovering(self) -> bool:
        """Whether a fault has not been recovered from yet."""
        return bool(self._open)

    def add(self, kind: str, step: int, **about: Any) -> None:
        """An incident that needs no recovery. about: further fields of `Incident`."""
        self._add(Incident(kind, step, self._now_ms(), **about))

    def open(
        self,
        kind: str,
        step: int,
        *,
        interrupts: bool = True,
        detected_in_s: float | None = None,
        at_ms: int | None = None,
        **about: Any,
    ) -> None:
        """A fault was detected from which the run must recover.

        interrupts: whether the step that is being computed has to be computed again.
        detected_in_s: seconds since the last answer of the worker that is concerned.
        at_ms: Unix time of the detection, where it was not now.
        """
        replayed = self._batch_size if interrupts and not self._open else 0
        index = self._add(
            Incident(
                kind,
                step,
                at_ms or self._now_ms(),
                detected_in_s=detected_in_s,
                samples_replayed=replayed,
                **about,
            )
        )
        self._open.append((index, self._formed))

    def regrouped(self, step: int) -> None:
        """A generation was formed whose members have committed `step`."""
        self._resumed_from = step
        self._formed += 1

    def lost(self, steps: int) -> None:
        """The run goes back to a checkpoint: this many committed steps are computed again."""
        for index, _ in self._open[:1]:
            incident = self._log.incidents[index]
            self._replace(
                index,
                replace(
                    incident,
                    steps_lost=steps,
                    samples_replayed=incident.samples_replayed + steps * self._batch_size,
                ),
            )

    def committed(self, record: StepRecord) -> float | None:
        """A step was committed: incidents before the last regroup are over. Seconds that the longest took, if any."""
        over = [index for index, formed in self._open if formed < self._formed]
        if not over or record.step <= self._resumed_from:
            return None
        took = 0.0
        for index in over:
            incident = self._log.incidents[index]
            since = max(record.time_ms - incident.time_ms, 0) / 1000
            self._replace(index, replace(incident, recovered_in_s=since))
            took = max(took, since)
        self._open = [entry for entry in self._open if entry[0] not in over]
        return took

    def is_new(self, notice: Notice) -> bool:
        """Whether this is the first rank's report of the notice: all ranks report the same ones."""
        key = (notice.kind, notice.step, notice.rank)
        known = key in self._noticed
        self._noticed.add(key)
        return not known

    def notice(self, notice: Notice, members: Mapping[int, tuple[str, str]]) -> None:
        """Keep a notice of the ranks as an incident. `members`: rank -> (worker, host)."""
        worker, host = members.get(-1 if notice.rank is None else notice.rank, ("", ""))
        again = notice.kind in ("step repeated", "diverged")
        self.add(
            notice.kind,
            notice.step,
            worker=worker,
            host=host,
            detail=notice.detail,
            samples_replayed=self._batch_size if again else 0,
            extra={**notice.extra, "generation": notice.generation},
        )

    def _add(self, incident: Incident) -> int:
        # A worker's error may hold what its config read from the environment.
        incident = Incident(**masked(asdict(incident)))
        self._log.incident(incident)
        self._notify(incident)
        return len(self._log.incidents) - 1

    def _replace(self, index: int, incident: Incident) -> None:
        incident = Incident(**masked(asdict(incident)))
        self._log.amend(index, incident)

    # -- goodput ------------------------------------------------------------------------

    def add_useful_time(self, status: WorkerStatus, *, is_reporter: bool) -> None:
        """Add up the time of committed steps: the reporter's alone, since all ranks step together."""
        before = self._useful.get(status.worker_id, 0.0)
        self._useful[status.worker_id] = status.useful_s
        if is_reporter:
            self.useful_s += max(0.0, status.useful_s - before)

    @property
    def wall_s(self) -> float:
        """Seconds since the start of this process's part of the run."""
        return self._clock.monotonic() - self._began

    @property
    def goodput(self) -> float:
        """Time spent in committed steps over the time since the run's start."""
        return self.useful_s / max(self.wall_s, 1e-9)

    def _now_ms(self) -> int:
        return int(self._clock.time() * 1000)
