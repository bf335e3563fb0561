"""Training in float16: the factor on the loss that keeps small gradients from becoming zero.

The rule is that of `torch.amp.GradScaler` (Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SCALER = "scaler/"
"""What the names of its numbers in the training state begin with."""
_LARGEST = 2.0**127


@dataclass
class LossScale:
    """The factor, a power of two: doubled after enough good steps, halved where a gradient overflows.

    It is the same on all ranks, since it depends on what every rank knows of the former steps alone.
    """

    scale: float = 2.0**16
    good_steps: int = 0
    """Steps since the factor changed the last time."""
    overflows: int = 0
    """Steps that were skipped because a gradient overflowed."""
    growth_every: int = 2000

    def good(self) -> None:
        """Count a step whose update took place."""
        self.good_steps += 1
        if self.good_steps == self.growth_every:
            self.scale, self.good_steps = min(2 * self.scale, _LARGEST), 0

    def overflowed(self) -> None:
        """Count a step that was skipped because a gradient overflowed."""
        self.scale, self.good_steps, self.overflows = self.scale / 2, 0, self.overflows + 1

    def tensors(self) -> dict[str, Tensor]:
        """The numbers as 0-d tensors, by their names in the training state."""
        values = {"scale": self.scale, "good_steps": self.good_steps, "overflows": self.overflows}
        return {SCALER + name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the numbers from a training state; the first ones again from that of a run in another precision."""
        first = LossScale().tensors()
        found = {name: float(tensors.get(name, value)) for name, value in first.items()}
        self.scale = found[SCALER + "scale"]
        self.good_steps, self.overflows = int(found[SCALER + "good_steps"]), int(found[SCALER + "overflows"])
