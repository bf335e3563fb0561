"""A replica's checkpoints: when one is due, what goes into this rank's share, what waits for its copy."""

from pathlib import Path

from descent.checkpoint import manifest as checkpoint
from descent.checkpoint.writer import ShareWriter
from descent.config import RunConfig
from descent.messages import ShareWritten
from descent.storage import Location
from descent.training.collectives import Group
from descent.training.control import Control
from descent.training.evaluation import Evaluator
from descent.training.plan import Plan
from descent.training.state import MODEL, TrainState

_PATIENCE_S = 5.0
"""How long a step waits for the save before the one that is due."""


class ReplicaCheckpoints:
    """Saves the state as it is after a step; the shares of all ranks together are the checkpoint."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        run_dir: Path,
        state: TrainState,
        evaluator: Evaluator,
        control: Control,
    ) -> None:
        self._every, self._plan, self._state = config.checkpoint.every, plan, state
        self._evaluator, self._control = evaluator, control
        self._saver = ShareWriter(checkpoint.folder(run_dir, config.checkpoint.dir), self._saved)
        # The last save's copy is made while gradients are computed; only the update must wait for it.
        state.optimizer.register_step_pre_hook(lambda *_: self.copied())
        self._changed_by_forward = frozenset(MODEL + n for n, _ in state.model.named_buffers())

    def is_due(self) -> bool:
        """Whether this step asks for a checkpoint, on every rank alike."""
        return self._plan.is_due(self._every, self._state.step) or self._evaluator.improved

    def save(self, group: Group, generation: int, *, wait: bool) -> None:
        """wait: for a save before that is still under way, however long it takes; else give this one up."""
        self._control.enter("save")
        scores = self._evaluator.scores()
        self._evaluator.improved = False
        self._saver.save(
            self._state.tensors(),
            step=self._state.step,
            rank=group.rank,
            world_size=group.world_size,
            generation=generation,
            scalars={**self._state.scalars(), **scores},
            now=self._changed_by_forward,
            patience_s=None if wait else _PATIENCE_S,
        )

    def _saved(self, part: ShareWritten) -> None:
        self._control.parts.append(part)
        self._control.notify()

    def go_elsewhere(self, root: Location) -> None:
        """What is saved from now on goes there."""
        self.wait()
        self._saver.root = root

    def copied(self) -> None:
        """Wait until the last save has its copy of the state, which may then change."""
        self._saver.copied()

    def wait(self) -> None:
        """Wait until the background write is on disk."""
        self._saver.wait()
