"""Checkpoints as the controller sees them: ranks report their shares, a complete set is committed."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from descent.checkpoint.cadence import Cadence
from descent.checkpoint.manifest import commit_checkpoint, read_manifest
from descent.checkpoint.reader import NoCheckpoint, newest_checkpoint
from descent.checkpoint.retention import Retention, prune
from descent.cluster.clock import SYSTEM_CLOCK, Clock
from descent.config.schema import Checkpoint
from descent.errors import DescentError, StoreError
from descent.messages import ShareWritten
from descent.storage import Location, open_store


@dataclass(frozen=True)
class CheckpointResult:
    """A checkpoint was committed, or could not be: see `error`."""

    step: int
    error: str | None = None
    stalled_s: float = 0.0
    """Seconds for which the training thread of the slowest rank waited."""
    size: int = 0
    """Bytes."""


class CheckpointCommitter:
    """Collects the ranks' shares of a checkpoint, and commits it when the last one is there.

    A thread commits and deletes: storage that doesn't answer for a minute must not keep the
    controller from its workers.
    """

    def __init__(
        self,
        root: Location,
        run: str,
        config_sha256: str,
        settings: Checkpoint,
        newest: Location | None,
        rescued: Path | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """newest: the checkpoint that the run begins with. rescued: see `use_rescue_folder`."""
        self.root, self._run, self._clock = root, run, clock
        self._rescued = rescued
        self._config_sha256 = config_sha256
        self._keep = retention_of(settings)
        self._shares: dict[tuple[int, int], dict[int, ShareWritten]] = {}
        """By (generation, step) and rank."""
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._under_way: list[tuple[list[ShareWritten], Future[Location]]] = []
        self.cadence = Cadence(settings.every_s, settings.share, clock.monotonic())
        self.newest = newest
        """The last committed checkpoint; None before the first."""
        self._rejected: dict[str, str] = {}
        """Address -> why, of checkpoints that verify and are not of this run's state."""
        self.step = read_manifest(newest).step if newest is not None else -1

    @property
    def unfinished(self) -> bool:
        """Whether a checkpoint waits for shares, or is being committed."""
        return bool(self._shares or self._under_way)

    @property
    def committing(self) -> bool:
        """Whether a complete checkpoint is being committed at this moment."""
        return bool(self._under_way)

    def add_share(self, share: ShareWritten) -> None:
        """Add a rank's share; with the last one the commit begins, whose result `take_results` returns."""
        key = (share.generation, share.step)
        shares = self._shares.setdefault(key, {})
        shares[share.rank] = share
        if len(shares) == share.world_size:
            del self._shares[key]
            ordered = [shares[rank] for rank in range(share.world_size)]
            self._under_way.append((ordered, self._thread.submit(self._commit, ordered)))

    def _commit(self, shares: list[ShareWritten]) -> Location:
        failed = [share.error for share in shares if share.error]
        if failed:
            raise DescentError(failed[0])
        return commit_checkpoint(
            self.root,
            shares,
            run=self._run,
            config_sha256=self._config_sha256,
            time_ms=int(self._clock.time() * 1000),
        )

    def take_results(self) -> list[CheckpointResult]:
        """The checkpoints that were committed, or failed, since the last call."""
        results = []
        while self._under_way and self._under_way[0][1].done():
            shares, future = self._under_way.pop(0)
            step, stalled_s = shares[0].step, max(share.stalled_s for share in shares)
            error = future.exception()
            if error is None:
                self.newest, self.step = future.result(), step
                self._rejected.pop(str(self.newest), None)
                self.cadence.committed(self._clock.monotonic(), stalled_s, max(share.took_s for share in shares))
                self._thread.submit(self._prune, step)
                size = sum(file.size for share in shares for file in share.files)
                results.append(CheckpointResult(step, None, stalled_s, size))
            else:
                self.cadence.failed()
                message = str(error) if isinstance(error, DescentError) else f"{type(error).__name__}: {error}"
                results.append(CheckpointResult(step, message, stalled_s))
        return results

    def use_rescue_folder(self) -> Path | None:
        """Commit into the run's own folder from now on, since `root` takes no checkpoint; None if they are the same."""
        if self._rescued is None or self._rescued == self.root:
            return None
        self.root = self._rescued
        return self._rescued

    def wait(self, patience_s: float) -> None:
        """Wait, at most so many seconds, for the commits that are under way."""
        wait([future for _, future in self._under_way], timeout=max(0.0, patience_s))

    def _prune(self, newest_step: int) -> None:
        """Delete what the retention rule doesn't keep; what can't be deleted now is deleted the next time."""
        try:
            prune(self.root, self._keep, config_sha256=self._config_sha256, newest_step=newest_step)
        except StoreError:
            return

    def drop_incomplete(self) -> None:
        """Forget the shares of the generation before: its missing ones will never be written."""
        self._shares.clear()

    def reject_newest(self, reason: str) -> None:
        """Pass over the newest checkpoint from now on: the workers read it, and it is not of this run's state."""
        if self.newest is not None:
            self._rejected[str(self.newest)] = reason

    def return_to_newest(self) -> list[str]:
        """Make the newest checkpoint that verifies the current one; the reasons why newer ones were skipped.

        Raises CheckpointError when there are checkpoints and none of them verifies, StoreError when they
        can't be read: the run must not begin again in silence.
        """
        self.cadence.restored()
        try:
            self.newest, skipped = newest_checkpoint(self.root, self._config_sha256, self._rescued, self._rejected)
        except NoCheckpoint:
            self.newest, self.step = None, -1
            return []
        self.step = read_manifest(self.newest).step
        return skipped

    def close(self) -> None:
        """After the last checkpoint: finish deleting, and remove what interrupted writes left. Never raises."""
        self._thread.shutdown(wait=True)
        try:
            open_store(self.root).tidy(older_than_s=0.0)  # by now nobody writes here any more
        except StoreError:
            return


def retention_of(settings: Checkpoint) -> Retention:
    """The retention rule that a config asks for."""
    best = settings.keep_best
    return Retention(
        settings.keep_last,
        settings.keep_every,
        best.metric if best else None,
        "max" if best and best.higher else "min",
    )
