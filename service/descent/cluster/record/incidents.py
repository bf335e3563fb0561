"""What went wrong in a run and what it cost: incidents from their detection to their recovery, and goodput."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from descent.cluster.record.run_log import RunLog
from descent.config.secrets import masked
from descent.messages import Incident, Notice, StepRecord, WorkerStatus


class IncidentLog:
    """Keeps incidents, in the run's folder and for the listener; open until a step is committed again."""

    def __init__(self, log: RunLog, tell: Callable[[Incident], None], batch_size: int) -> None:
        self._log, self._tell, self._batch_size = log, tell, batch_size
        self._open: list[tuple[int, int]] = []
        """(index of an incident, generations formed when it was opened)."""
        self._formed = 0
        self._resumed_from = 0
        self._noticed: set[tuple[str, int, int | None]] = set()
        self._useful: dict[str, float] = {}
        self.useful_s = 0.0
        self._began = time.monotonic()

    # -- incidents ----------------------------------------------------------------------

    @property
    def recovering(self) -> bool:
        """Whether a fault has not been recovered from yet."""
        return bool(self._open)

    def note(self, kind: str, step: int, **about: Any) -> None:
        """An incident that needs no recovery."""
        self._add(Incident(kind, step, _now_ms(), **about))

    def open(
        self,
        kind: str,
        step: int,
        *,
        interrupts: bool = True,
        unheard_s: float | None = None,
        at_ms: int | None = None,
        **about: Any,
    ) -> None:
        """A fault was detected, `unheard_s` after the worker's last sign of life.

        interrupts: whether the step that is being computed has to be computed again.
        """
        replayed = self._batch_size if interrupts and not self._open else 0
        index = self._add(
            Incident(
                kind,
                step,
                at_ms or _now_ms(),
                detected_in_s=unheard_s,
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
        """A step was committed: whatever is open is over. The seconds that it took, if there was something."""
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
        """Whether it is heard for the first time: all ranks tell the same."""
        key = (notice.kind, notice.step, notice.rank)
        known = key in self._noticed
        self._noticed.add(key)
        return not known

    def notice(self, notice: Notice, members: Mapping[int, tuple[str, str]]) -> None:
        """Keep what the ranks told. `members`: rank -> (worker, host)."""
        worker, host = members.get(-1 if notice.rank is None else notice.rank, ("", ""))
        again = notice.kind in ("step repeated", "diverged")
        self.note(
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
        self._tell(incident)
        return len(self._log.incidents) - 1

    def _replace(self, index: int, incident: Incident) -> None:
        incident = Incident(**masked(asdict(incident)))
        self._log.amend(index, incident)

    # -- goodput ------------------------------------------------------------------------

    def hear(self, status: WorkerStatus, reporter: bool) -> None:
        """Add up the time of committed steps: the reporter's, since all ranks step together."""
        before = self._useful.get(status.worker_id, 0.0)
        self._useful[status.worker_id] = status.useful_s
        if reporter:
            self.useful_s += max(0.0, status.useful_s - before)

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def goodput(self) -> float:
        """Time spent in committed steps over the time since the run's start."""
        return self.useful_s / max(self.wall_s, 1e-9)


def _now_ms() -> int:
    return int(time.time() * 1000)
