"""A replica's side of checkpoints: when one is due, what goes into this rank's share, what waits for the copy."""

from pathlib import Path

from descent.checkpoint.frozen import are_left_out, digest_of, frozen_parameters
from descent.checkpoint.manifest import checkpoint_root
from descent.checkpoint.writer import ShareWriter
from descent.config import RunConfig
from descent.messages import ShareWritten
from descent.optim.modes import has_modes
from descent.storage import Location
from descent.training.collectives import Group
from descent.training.control import Control
from descent.training.evaluation import Evaluator
from descent.training.plan import Plan
from descent.training.state import MODEL, TrainState

_PATIENCE_S = 5.0
"""How long a step waits for the checkpoint before the one that is due."""


class ReplicaCheckpoints:
    """Writes this rank's share of the state after a step; the shares of all ranks are the checkpoint.

    The controller, which gets a `ShareWritten` from each rank through `control.shares`, commits it.
    """

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
        self._writer = ShareWriter(checkpoint_root(run_dir, config.checkpoint.dir), self._report)
        # The share is copied while the next gradients are computed; only the update must wait for the copy.
        state.optimizer.register_step_pre_hook(lambda *_: self.wait_for_copy())
        self._changed_by_forward = frozenset(MODEL + n for n, _ in state.model.named_buffers())
        frozen = frozen_parameters(state.model)
        left_out = are_left_out(state.model, config.checkpoint.save_frozen)
        self._left_out = frozenset(MODEL + name for name in frozen) if left_out else frozenset()
        self._frozen = digest_of(frozen) if left_out else ""

    def is_due(self) -> bool:
        """Whether there is a checkpoint after this step by the config; the answer is the same on every rank."""
        return self._plan.is_due(self._every, self._state.step) or self._evaluator.improved

    def write_share(self, group: Group, generation: int, *, wait: bool) -> None:
        """Write this rank's share of the state as it is now; returns before it is written.

        wait: if the share before is still being written, wait as long as that takes; else, after
        some seconds, give this one up.
        """
        self._control.enter("save")
        scores = self._evaluator.scores()
        self._evaluator.improved = False
        tensors = self._state.tensors()
        if has_modes(self._state.optimizer):
            self.wait_for_copy()  # the weights are others for a moment
            tensors |= self._state.evaluated_weights()
        self._writer.write(
            {name: t for name, t in tensors.items() if name not in self._left_out},
            step=self._state.step,
            rank=group.rank,
            world_size=group.world_size,
            generation=generation,
            scalars={**self._state.scalars(), **scores},
            copy_now=self._changed_by_forward,
            patience_s=None if wait else _PATIENCE_S,
            frozen=self._frozen,
        )

    def _report(self, share: ShareWritten) -> None:
        self._control.shares.append(share)
        self._control.notify()

    def move_to(self, root: Location) -> None:
        """Write all further shares under another folder."""
        self.wait_until_written()
        self._writer.root = root

    def wait_for_copy(self) -> None:
        """Return once the last share is copied, so that the state may change."""
        self._writer.wait_for_copy()

    def wait_until_written(self) -> None:
        """Return once the last share is on disk or S3, or has failed."""
        self._writer.wait_until_written()
