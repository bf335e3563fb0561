"""The end of a run: the last records and the last checkpoint are fetched, a state without a place is rescued."""

from collections.abc import Callable

from descent.cluster.chaos.injector import Chaos
from descent.cluster.clock import Clock
from descent.cluster.control import policy
from descent.cluster.control.checkpoints import CheckpointCommitter
from descent.cluster.control.intake import POLL_S, Intake
from descent.cluster.control.journal import Journal
from descent.cluster.control.outcome import Outcome
from descent.cluster.control.run_state import RunState
from descent.cluster.workers.group import WorkerGroup
from descent.messages import TerminalState, WorkerFailure, WorkerState
from descent.storage import Location

_LAST_CHECKPOINT_S = 120.0
"""How long the last checkpoint may take."""
_LAST_RECORDS_S = 5.0
"""How long the last records are fetched when no checkpoint is to come: the run has failed."""


class Ending:
    """Leads a run from the decision to end it to its outcome; it keeps nothing itself."""

    def __init__(
        self,
        state: RunState,
        group: WorkerGroup,
        journal: Journal,
        committer: CheckpointCommitter,
        intake: Intake,
        chaos: Chaos,
        clock: Clock,
        *,
        send_memberships: Callable[..., None],
        batch_size: int,
        first_step: int,
    ) -> None:
        """send_memberships: tells the members of the current generation their places, see `RunState.memberships`."""
        self._state, self._group, self._journal, self._committer = state, group, journal, committer
        self._intake, self._chaos, self._clock = intake, chaos, clock
        self._send_memberships, self._batch_size, self._first_step = send_memberships, batch_size, first_step

    def finish(self, decision: policy.End) -> Outcome:
        """Fetch the last records and checkpoint, rescue the state where it could not be written, and sum up."""
        state = self._state
        state.end_begun(self._clock.monotonic())
        failures = [w.status.failure for w in self._group.workers.values() if w.status and w.status.failure]
        no_checkpoint_comes = bool(failures or state.fatal_error)
        members = state.generation.members
        self._drain(members, _LAST_RECORDS_S if no_checkpoint_comes else _LAST_CHECKPOINT_S)
        unsaved_at = self._rescue(members)
        if state.fatal_error:
            decision = policy.End(TerminalState.FAILED, state.fatal_error)
        state.ended(self._clock.monotonic())
        outcome = self._outcome(decision, members, failures)
        outcome.unsaved_at = unsaved_at
        return outcome

    def _outcome(self, decision: policy.End, members: tuple[str, ...], failures: list[WorkerFailure]) -> Outcome:
        state, incidents = self._state, self._journal.incidents
        statuses = {w: worker.status for w, worker in self._group.workers.items() if worker.status}
        last = {w: s for w, s in statuses.items() if w in members}
        hashes = {s.state_sha256 for s in last.values() if s.state_sha256}
        if len(hashes) > 1:
            self._journal.listener.note("the replicas ended with different bits: please report this")
        failed = decision.state is TerminalState.FAILED
        self._chaos.finished(decision.state is TerminalState.FINISHED)
        return Outcome(
            state=decision.state,
            reason=f"{failures[-1].kind}: {failures[-1].message}" if failures and failed else decision.reason,
            step=state.committed,
            failure=(failures[-1] if failures else state.last_failure) if failed else None,
            checkpoint=self._committer.newest,
            state_sha256=min(hashes) if len(hashes) == 1 else None,
            wall_s=incidents.wall_s,
            useful_s=incidents.useful_s,
            samples=(state.committed - self._first_step) * self._batch_size,
            incidents=self._journal.log.incidents,
            peak_rss_mb=max((s.peak_rss_mb for s in statuses.values()), default=0.0),
            workers={w: s.node for w, s in last.items()},
            chaos=self._chaos.verdict(self._journal.log.steps_lost),
        )

    def _drain(self, members: tuple[str, ...], patience_s: float) -> None:
        """Fetch what the members still have: the last records, and their shares of the last checkpoint."""
        deadline = self._clock.monotonic() + patience_s
        living = lambda: {w for w in members if not self._group.workers[w].dead}  # noqa: E731
        waiting = living()
        quiet_rounds = 0
        while waiting and quiet_rounds < 2 and self._clock.monotonic() < deadline:
            before = self._journal.log.acknowledged
            waiting -= self._intake.poll(self._intake.reporter, wait_s=0.02)
            waiting &= living()
            if waiting or self._committer.unfinished:
                quiet_rounds = 0
            else:  # all have answered: twice without anything new is the end
                quiet_rounds = quiet_rounds + 1 if before == self._journal.log.acknowledged else 0
                waiting = living()
        self._committer.wait(deadline - self._clock.monotonic())
        self._intake.take_checkpoint_results()
        self._journal.log.flush()

    def _rescue(self, members: tuple[str, ...]) -> Location | None:
        """Write the last state into the run's own folder when it could not be written where it belongs.

        Returns the place that didn't take it; None where nothing had to be, or could be, rescued.
        """
        state, workers, wanted = self._state, self._group.workers, self._committer.root
        holders = [
            w
            for w in members
            if state.holds_state(w)
            and not workers[w].dead
            and (status := workers[w].status) is not None
            and status.step == state.committed
            and status.state in policy.ALIVE_IDLE
        ]
        if not state.checkpoint_failed or self._committer.step >= state.committed or not holders:
            return None
        folder = self._committer.use_rescue_folder()
        if folder is None:
            return None
        holder = workers[holders[0]]
        generation = state.form_rescue(holder.worker_id)
        self._send_memberships(save_to=folder)
        deadline = self._clock.monotonic() + _LAST_CHECKPOINT_S
        while self._clock.monotonic() < deadline and not holder.dead:
            self._intake.poll(reporter=None, wait_s=POLL_S)
            now = holder.status
            if now is not None and now.generation == generation.number and now.state is not WorkerState.RUNNING:
                break
        self._drain(generation.members, deadline - self._clock.monotonic())
        return wanted if self._committer.step == state.committed else None
