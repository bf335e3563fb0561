"""Checkpoints as the controller sees them: parts come in from the ranks, a whole set is committed."""

from pathlib import Path

from service.artifacts import checkpoint
from service.errors import CheckpointError, DescentError
from service.messages import PartWritten


class Commits:
    """Collects the ranks' parts and commits a checkpoint when the last one is there."""

    def __init__(
        self, root: Path, run: str, config_sha256: str, keep_last: int, newest: Path | None
    ) -> None:
        self._root, self._run = root, run
        self._config_sha256, self._keep_last = config_sha256, keep_last
        self._parts: dict[tuple[int, int], dict[int, PartWritten]] = {}
        self.newest = newest
        """The last committed checkpoint."""
        self.step = checkpoint.read_manifest(newest).step if newest is not None else -1

    @property
    def waiting(self) -> bool:
        """Whether parts of an unfinished checkpoint are there."""
        return bool(self._parts)

    def collect(self, part: PartWritten) -> str | None:
        """Take in a part; what went wrong if the checkpoint, now whole, could not be committed."""
        key = (part.generation, part.step)
        parts = self._parts.setdefault(key, {})
        parts[part.rank] = part
        if len(parts) < part.world_size:
            return None
        del self._parts[key]
        failed = [p.error for p in parts.values() if p.error]
        if failed:
            return failed[0]
        try:
            ordered = [parts[r] for r in range(part.world_size)]
            self.newest = checkpoint.commit(
                self._root, ordered, run=self._run, config_sha256=self._config_sha256
            )
            self.step = part.step
            checkpoint.prune(self._root, self._keep_last)
        except (DescentError, OSError) as error:
            return str(error)
        return None

    def forget(self) -> None:
        """A new generation: what the old one has not finished writing will never be whole."""
        self._parts.clear()

    def go_back(self) -> list[str]:
        """Find the newest checkpoint on disk that verifies; the reasons why newer ones were skipped."""
        try:
            self.newest, skipped = checkpoint.newest(self._root)
        except CheckpointError:
            self.newest, self.step = None, -1
            return []
        self.step = checkpoint.read_manifest(self.newest).step
        return skipped
