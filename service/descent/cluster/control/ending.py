"""The end of a run: how it ended, the last records and saves fetched, the last state rescued."""

import time
from dataclasses import dataclass, field

from descent.cluster.chaos.injector import Verdict
from descent.cluster.control import policy
from descent.cluster.control.checkpoints import CheckpointCommitter
from descent.cluster.control.generation import Generation, StateHolders
from descent.cluster.control.reports import POLL_S, Reports
from descent.cluster.record.run_log import RunLog
from descent.cluster.workers.group import WorkerGroup
from descent.messages import Incident, Membership, TerminalState, WorkerFailure, WorkerState
from descent.storage import Location
from descent.training.collectives import Store
from descent.training.plan import Plan
from descent.training.slot_balancer import assign_slots

SAVE_S = 120.0
"""How long the last save may take."""


@dataclass
class Outcome:
    """How a run ended."""

    state: TerminalState
    reason: str
    step: int
    failure: WorkerFailure | None = None
    checkpoint: Location | None = None
    state_sha256: str | None = None
    wall_s: float = 0.0
    useful_s: float = 0.0
    samples: int = 0
    incidents: list[Incident] = field(default_factory=list)
    peak_rss_mb: float = 0.0
    workers: dict[str, str] = field(default_factory=dict)
    """The last generation's workers and the Ray nodes that they were on."""
    chaos: Verdict | None = None
    """How the run took the faults that were injected into it."""
    unsaved_at: Location | None = None
    """Where the last state should have been saved and could not be; `checkpoint` is in the run's folder then."""

    @property
    def goodput(self) -> float:
        """Time spent in committed steps over wall time."""
        return self.useful_s / self.wall_s if self.wall_s > 0 else 0.0


class Ending:
    """Brings in what the workers still hold, when nothing more is to be trained."""

    def __init__(
        self,
        plan: Plan,
        group: WorkerGroup,
        store: Store,
        log: RunLog,
        commits: CheckpointCommitter,
        *,
        reports: Reports,
        generation: Generation,
        holders: StateHolders,
    ) -> None:
        self._plan, self._group, self._store = plan, group, store
        self._log, self._commits, self._reports = log, commits, reports
        self._generation, self._holders = generation, holders

    def rescue(self) -> Location | None:
        """Save the last state into the run's own folder when it could not be saved where it belongs.

        Returns the place that didn't take it, None where nothing had to be, or could be, rescued.
        """
        holders = [
            w
            for w in self._generation.members
            if w in self._holders
            and not (h := self._group.handles[w]).dead
            and h.status is not None
            and h.status.step == self._reports.committed
            and h.status.state in policy.ALIVE_IDLE
        ]
        wanted = self._commits.root
        if not self._reports.save_failed or self._commits.step >= self._reports.committed or not holders:
            return None
        local = self._commits.move_to_rescue()
        if local is None:
            return None
        self._generation.number += 1
        members, self._generation.members = self._generation.members, (holders[0],)
        self._group.join(
            holders[0],
            Membership(
                generation=self._generation.number,
                rank=0,
                world_size=1,
                store_host=self._store.host,
                store_port=self._store.port,
                slots=assign_slots(self._plan.slots, 1),
                micro_size=self._reports.micro_size,
                save_only=True,
                save_to=str(local),
            ),
        )
        deadline = time.monotonic() + SAVE_S
        handle = self._group.handles[holders[0]]
        while time.monotonic() < deadline and not handle.dead:
            self._reports.poll(reporter=None, wait_s=POLL_S)
            now = handle.status
            if now is not None and now.generation == self._generation.number and now.state is not WorkerState.RUNNING:
                break
        self.drain(deadline - time.monotonic())
        self._generation.members = members
        return wanted if self._commits.step == self._reports.committed else None

    def drain(self, patience_s: float) -> None:
        """Fetch what the members still hold: the last records, and the parts of the last checkpoint."""
        deadline = time.monotonic() + patience_s
        waiting = {w for w in self._generation.members if not self._group.handles[w].dead}
        quiet = 0
        while waiting and quiet < 2 and time.monotonic() < deadline:
            before = (self._log.last_step, self._log.last_evaluation, self._commits.newest)
            waiting -= self._reports.poll(self._reports.reporter, wait_s=0.02)
            waiting = {w for w in waiting if not self._group.handles[w].dead}
            now = (self._log.last_step, self._log.last_evaluation, self._commits.newest)
            done = not waiting and not self._commits.waiting
            quiet = quiet + 1 if done and before == now else 0
            if done and quiet < 2:
                waiting = {w for w in self._generation.members if not self._group.handles[w].dead}
        self._commits.wait(deadline - time.monotonic())
        self._reports.hear_of_saves()
        self._log.flush()
