"""Checkpoints as the controller sees them: parts come in from the ranks, a whole set is committed."""

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from descent.checkpoint.cadence import Cadence
from descent.checkpoint.manifest import commit_checkpoint, read_manifest
from descent.checkpoint.reader import NoCheckpoint, newest_checkpoint
from descent.checkpoint.retention import Retention, prune
from descent.config.schema import Checkpoint
from descent.errors import DescentError, StoreError
from descent.messages import ShareWritten
from descent.storage import Location, open_store


@dataclass(frozen=True)
class Saved:
    """What became of a checkpoint: committed, or why not."""

    step: int
    error: str | None = None
    stalled_s: float = 0.0
    """How long it held the slowest rank up."""
    size: int = 0


class CheckpointCommitter:
    """Collects the ranks' parts and commits a checkpoint when the last one is there.

    Committing and deleting go on behind: a store that doesn't answer for a minute must not
    keep the controller from its workers.
    """

    def __init__(
        self,
        root: Location,
        run: str,
        config_sha256: str,
        settings: Checkpoint,
        newest: Location | None,
        rescued: Path | None = None,
    ) -> None:
        self.root, self._run = root, run
        self._rescued = rescued
        """The run's own folder, where its last state goes if `root` doesn't take it."""
        self._config_sha256 = config_sha256
        self._keep = retention_of(settings)
        self._parts: dict[tuple[int, int], dict[int, ShareWritten]] = {}
        self._thread = ThreadPoolExecutor(1, "commits")
        self._under_way: list[tuple[list[ShareWritten], Future[Location]]] = []
        self.cadence = Cadence(settings.every_s, settings.share)
        self.newest = newest
        """The last committed checkpoint."""
        self._rejected: dict[str, str] = {}
        """Address -> why, of checkpoints that verify and are not of this run's state."""
        self.step = read_manifest(newest).step if newest is not None else -1

    @property
    def waiting(self) -> bool:
        """Whether parts of an unfinished checkpoint are there."""
        return bool(self._parts or self._under_way)

    @property
    def committing(self) -> bool:
        """Whether a whole checkpoint is being committed at this moment."""
        return bool(self._under_way)

    def collect(self, part: ShareWritten) -> None:
        """Take in a part; with the last one the commit begins, and `news` tells how it went."""
        key = (part.generation, part.step)
        parts = self._parts.setdefault(key, {})
        parts[part.rank] = part
        if len(parts) == part.world_size:
            del self._parts[key]
            ordered = [parts[rank] for rank in range(part.world_size)]
            self._under_way.append((ordered, self._thread.submit(self._commit, ordered)))

    def _commit(self, parts: list[ShareWritten]) -> Location:
        failed = [p.error for p in parts if p.error]
        if failed:
            raise DescentError(failed[0])
        return commit_checkpoint(
            self.root,
            parts,
            run=self._run,
            config_sha256=self._config_sha256,
            time_ms=int(time.time() * 1000),
        )

    def news(self) -> list[Saved]:
        """The checkpoints that have been committed, or have failed, since the last call."""
        found = []
        while self._under_way and self._under_way[0][1].done():
            parts, future = self._under_way.pop(0)
            step, stalled_s = parts[0].step, max(p.stalled_s for p in parts)
            error = future.exception()
            if error is None:
                self.newest, self.step = future.result(), step
                self._rejected.pop(str(self.newest), None)
                self.cadence.committed(time.monotonic(), stalled_s, max(p.took_s for p in parts))
                self._thread.submit(self._prune, step)
                size = sum(f.size for p in parts for f in p.files)
                found.append(Saved(step, None, stalled_s, size))
            else:
                self.cadence.failed()
                known = isinstance(error, DescentError)
                wrong = str(error) if known else f"{type(error).__name__}: {error}"
                found.append(Saved(step, wrong, stalled_s))
        return found

    def move_to_rescue(self) -> Path | None:
        """What is saved from now on goes into the run's own folder; None if that is no other place."""
        if self._rescued is None or self._rescued == self.root:
            return None
        self.root = self._rescued
        return self._rescued

    def wait(self, patience_s: float) -> None:
        """Wait for the commits that are under way."""
        wait([future for _, future in self._under_way], timeout=max(0.0, patience_s))

    def _prune(self, newest_step: int) -> None:
        """Delete what the rule doesn't keep; what can't be deleted now is deleted the next time."""
        try:
            prune(self.root, self._keep, config_sha256=self._config_sha256, newest_step=newest_step)
        except StoreError:
            return

    def forget(self) -> None:
        """A new generation: what the old one has not finished writing will never be whole."""
        self._parts.clear()

    def reject_newest(self, reason: str) -> None:
        """Pass over the newest checkpoint from now on: the workers read it, and it is not of this run's state."""
        if self.newest is not None:
            self._rejected[str(self.newest)] = reason

    def go_back(self) -> list[str]:
        """Find the newest checkpoint that verifies; the reasons why newer ones were skipped.

        Raises CheckpointError when there are some and none is good, StoreError when they can't
        be looked at: the run must not begin again in silence.
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
        """After the last save: finish deleting, and remove what died half done. Never raises."""
        self._thread.shutdown(wait=True)
        try:
            open_store(self.root).tidy(older_than_s=0.0)  # by now nobody writes here any more
        except StoreError:
            return


def retention_of(settings: Checkpoint) -> Retention:
    """The rule in a config's words."""
    best = settings.keep_best
    return Retention(
        settings.keep_last,
        settings.keep_every,
        best.metric if best else None,
        "max" if best and best.higher else "min",
    )
