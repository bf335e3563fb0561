"""What comes in from the workers: records, notices, parts of checkpoints, faults, and how far the run is."""

import time

from descent.cluster.chaos.injector import Chaos
from descent.cluster.control.checkpoints import CheckpointCommitter
from descent.cluster.control.generation import Generation, StateHolders
from descent.cluster.control.health import WorkerHealth
from descent.cluster.record.incidents import IncidentLog
from descent.cluster.record.listener import Listener
from descent.cluster.record.run_log import RunLog
from descent.cluster.workers.group import WorkerGroup
from descent.config import RunConfig
from descent.messages import Notice, StepRecord, WorkerState, WorkerStatus

POLL_S = 0.2
"""How long the controller listens before it looks round."""


class Reports:
    """Polls the workers, passes on what each part of the controller wants to hear, keeps where the run stands."""

    def __init__(
        self,
        config: RunConfig,
        group: WorkerGroup,
        log: RunLog,
        commits: CheckpointCommitter,
        listener: Listener,
        *,
        ledger: IncidentLog,
        roll: WorkerHealth,
        chaos: Chaos | None,
        generation: Generation,
        holders: StateHolders,
        first_step: int,
        micro_size: int,
    ) -> None:
        self._config, self._group, self._log, self._commits = config, group, log, commits
        self._listener, self._ledger, self._roll, self._chaos = listener, ledger, roll, chaos
        self._generation, self._holders = generation, holders
        self.committed = first_step
        """The last step that a worker is known to have committed."""
        self.micro_size = micro_size
        self._halved_in = -1
        self.broke_at: tuple[str, int, str] | None = None
        """Why and when (Unix ms) the generation broke, and what was seen of it, until its successor is formed."""
        self.unsaved = ""
        """Why a checkpoint that was required could not be written."""
        self.save_failed = False
        """Whether the last save that was heard of failed."""

    @property
    def reporter(self) -> str | None:
        """Whose records are fetched: every member has the same, the lowest living rank's are taken."""
        members, handles = self._generation.members, self._group.handles
        return next((w for w in members if not handles[w].dead), None)

    def poll(self, reporter: str | None, wait_s: float) -> set[str]:
        """Take in what is new, as soon as there is something, else after about `wait_s`; who has answered."""
        heard = set()
        for status in self._group.poll(
            acknowledged=self._log.acknowledged,
            reporter=reporter,
            wait_s=wait_s,
        ):
            self._hear(status)
            heard.add(status.worker_id)
        return heard

    def _hear(self, status: WorkerStatus) -> None:
        members, current = self._generation.members, status.generation == self._generation.number
        for part in status.parts:
            self._commits.collect(part)
        for notice in status.notices:
            if notice.kind == "injected":
                if self._chaos is not None:
                    self._chaos.notice(notice, status.worker_id)
            elif notice.generation == self._generation.number:
                self._hear_notice(notice)
        for record in status.records:
            if self._log.is_new(record):
                self._log.append(record)
                self._listener.record(record, len(members))
                if isinstance(record, StepRecord):
                    self._recovered(record)
                    if self._chaos is not None:
                        self._chaos.observe(record)
        self.committed = max(self.committed, status.step)
        self._holders.hear(status, self._generation.number)
        self._ledger.hear(status, status.worker_id == self.reporter)
        if status.leaving:
            self._roll.leaves(status.worker_id, "told to end (SIGTERM)", members, self.committed)
        if status.state is WorkerState.BROKEN and current:
            why = "out of memory" if status.out_of_memory else "connection lost"
            seen = f"{status.worker_id}, {status.broken_by}" if status.broken_by else ""
            self.broke_at = self.broke_at or (why, int(time.time() * 1000), seen)
        if status.diverged and current:
            self._holders.differ(members[rank] for rank in status.diverged)
        if status.out_of_memory and current:
            self._halve()

    def _halve(self) -> None:
        """A micro-batch didn't fit: once for a generation, however many workers say it how often."""
        if self._generation.number == self._halved_in or self.micro_size <= 1:
            return
        self._halved_in = self._generation.number
        self.micro_size = max(1, self.micro_size // 2)
        self._listener.note(
            f"out of memory: going on with batch.micro_size={self.micro_size}, which rounds differently; "
            "a run that is to have these bits again sets it from the start"
        )

    def _hear_notice(self, notice: Notice) -> None:
        if not self._ledger.is_new(notice):
            return
        if notice.kind == "slots dealt":  # a measure, not a fault
            self._listener.note(f"step {notice.step}: {notice.detail}")
            return
        if notice.kind == "checkpoint unusable":
            self._commits.reject_newest(notice.detail)
        members, handles = self._generation.members, self._group.handles
        self._ledger.notice(notice, {r: (w, handles[w].host) for r, w in enumerate(members)})
        if notice.kind == "straggler" and self._config.straggler.replace:
            if notice.rank is not None and notice.rank < len(members):
                self._roll.slow.add(members[notice.rank])

    def _recovered(self, record: StepRecord) -> None:
        took = self._ledger.committed(record)
        if took is not None:
            world = len(self._generation.members)
            self._listener.note(
                f"recovered in {took:.2f} s: generation {self._generation.number}, {world} "
                f"worker{'s' if world != 1 else ''}, at step {record.step}"
            )

    def hear_of_saves(self) -> None:
        """One that has failed is told, and tried again soon; where it is required, it is the end."""
        for saved in self._commits.news():
            self.save_failed = saved.error is not None
            if saved.error is not None:
                self._ledger.note("checkpoint failed", saved.step, detail=saved.error)
                if self._config.checkpoint.required:
                    self.unsaved = f"checkpoint.required=true: {saved.error}"
