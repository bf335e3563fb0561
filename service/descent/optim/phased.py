"""Several optimizers for one model, of which one updates its own part in each step."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


class Phased(torch.optim.Optimizer):
    """The optimizers of a training with phases, as one: all groups, all state, and a step of the active one."""

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        """optimizers: by the name of the phase; no parameter belongs to two of them."""
        # Not torch's own __init__, which would make groups of its own: these are the groups of the optimizers.
        self.optimizers = dict(optimizers)
        self.active = next(iter(self.optimizers))
        self.defaults: dict[str, Any] = {}
        self.param_groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        self.state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
        for optimizer in self.optimizers.values():
            optimizer.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Let the optimizer of the active phase update its parameters."""
        assert closure is None
        self.optimizers[self.active].step()

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """Call the hook before each step, whichever phase's. The handle is that of the first optimizer."""
        handles = [optimizer.register_step_pre_hook(hook) for optimizer in self.optimizers.values()]
        return handles[0]

    def train(self) -> None:
        """Put every optimizer that knows two modes into that of training."""
        self._switch("train")

    def eval(self) -> None:
        """Put every optimizer that knows two modes into that of evaluation."""
        self._switch("eval")

    def _switch(self, mode: str) -> None:
        for optimizer in self.optimizers.values():
            if callable(method := getattr(optimizer, mode, None)):
                method()
