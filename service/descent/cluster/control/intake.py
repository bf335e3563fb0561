"""What the workers answer: each answer is taken into the run's state, its journal and its checkpoints."""

from descent.cluster.chaos.injector import Chaos
from descent.cluster.clock import Clock
from descent.cluster.control.checkpoints import CheckpointCommitter
from descent.cluster.control.journal import Journal
from descent.cluster.control.run_state import RunState
from descent.cluster.workers.group import WorkerGroup
from descent.config import RunConfig
from descent.messages import Notice, StepRecord, WorkerStatus

POLL_S = 0.2
"""A poll without an answer returns after about this long."""


class Intake:
    """Polls the workers and passes on what they report; it keeps nothing itself."""

    def __init__(
        self,
        config: RunConfig,
        state: RunState,
        group: WorkerGroup,
        journal: Journal,
        committer: CheckpointCommitter,
        chaos: Chaos,
        clock: Clock,
    ) -> None:
        self._state, self._group, self._journal = state, group, journal
        self._committer, self._chaos, self._clock = committer, chaos, clock
        self._replace_slow, self._required = config.straggler.replace, config.checkpoint.required

    @property
    def reporter(self) -> str | None:
        """The worker whose records are fetched: all members have the same ones, so the first living one's."""
        return next((w for w in self._state.generation.members if not self._group.workers[w].dead), None)

    def poll(self, reporter: str | None, wait_s: float) -> set[str]:
        """Take in new answers, as soon as there is one, else after about `wait_s`; the ids of those that answered."""
        statuses = self._group.poll(acknowledged=self._journal.log.acknowledged, reporter=reporter, wait_s=wait_s)
        for status in statuses:
            self._receive(status)
        return {status.worker_id for status in statuses}

    def _receive(self, status: WorkerStatus) -> None:
        state, journal = self._state, self._journal
        for notice in status.notices:
            self._receive_notice(notice, status.worker_id)
        for record in journal.add_records(status.records, state.generation):
            if isinstance(record, StepRecord):
                self._chaos.step_committed(record)
        if status.shares:
            # A checkpoint is never ahead of the records on the disk: should this process die now, a
            # resume from it would leave out the steps in between.
            journal.log.flush()
            for share in status.shares:
                self._committer.add_share(share)
        micro_size = state.micro_size
        state.receive(status, self._now_ms())
        if state.micro_size < micro_size:
            journal.listener.note(
                f"out of memory: going on with batch.micro_size={state.micro_size}, which rounds differently; "
                "a run that is to have these bits again sets it from the start"
            )
        journal.incidents.add_useful_time(status, is_reporter=status.worker_id == self.reporter)
        if status.leaving:
            self.let_leave(status.worker_id, "asked to end (SIGTERM)")

    def _receive_notice(self, notice: Notice, worker_id: str) -> None:
        generation = self._state.generation
        if notice.kind == "injected":
            self._chaos.struck(notice, worker_id)
        elif notice.generation == generation.number:
            new = self._journal.add_notice(notice, generation, self._group.workers)
            if new and notice.kind == "checkpoint unusable":
                self._committer.reject_newest(notice.detail)
            if new and notice.kind == "straggler" and self._replace_slow:
                if notice.rank is not None and notice.rank < len(generation.members):
                    self._state.mark_slow(generation.members[notice.rank])

    def let_leave(self, worker_id: str, why: str) -> None:
        """A worker will go away soon: the others go on without it after a pause, and no step is lost."""
        if not self._state.start_leaving(worker_id) or worker_id not in self._state.generation.members:
            return
        host = self._group.workers[worker_id].host
        self._journal.incidents.open(
            "preempted", self._state.committed, interrupts=False, worker=worker_id, host=host, detail=why
        )
        self._group.request_checkpoint(worker_id)  # in case the worker is gone before another one has its state

    def take_checkpoint_results(self) -> None:
        """A checkpoint that failed is an incident, and is tried again soon; where one is required, the run ends."""
        for result in self._committer.take_results():
            self._state.checkpoint_ended(result.error, required=self._required)
            if result.error is not None:
                self._journal.incidents.add("checkpoint failed", result.step, detail=result.error)

    def _now_ms(self) -> int:
        return int(self._clock.time() * 1000)
