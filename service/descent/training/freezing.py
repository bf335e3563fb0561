"""Parameters that are not trained: for the whole run, or until a step.

Whether a parameter is trained is a function of the step alone (`optimizer.groups` with `from_step` and `freeze`), so
that a resumed run, a new worker and a step that runs again need nothing more.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from descent.errors import ConfigError, TrainingError
from descent.optim.parameter_groups import FROM_STEP


class Freezing:
    """Freezes the parameters of groups with `from_step` in the steps before it.

    A frozen parameter requires no gradient. So the backward doesn't compute one, and the optimizer, which leaves
    parameters without a gradient alone, neither updates nor decays the parameter, nor keeps anything for it: as in a
    loop by hand that sets `requires_grad` between two steps.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        names = {parameter: name for name, parameter in reversed(list(model.named_parameters()))}
        self._released: list[tuple[int, str, nn.Parameter]] = []
        """(the first step that trains the parameter, name, parameter)."""
        for group in optimizer.param_groups:
            if group.get(FROM_STEP, 1) > 1:
                self._released += [(group[FROM_STEP], names[p], p) for p in group["params"]]
        self._never = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self.last = max((first for first, _, _ in self._released), default=1)
        """From this step on every parameter is trained that ever is."""

    @contextmanager
    def taken(self, step: int) -> Iterator[None]:
        """Within the block, which takes the step, the parameters of later groups are frozen."""
        if step >= self.last:
            yield
            return
        frozen = [p for first, _, p in self._released if step < first]
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def check(self, step: int) -> None:
        """Raise TrainingError where the model has released a frozen parameter by itself: no optimizer would train it."""
        name = next((name for name, p in self._never if p.requires_grad), None)
        if name is None and step < self.last:
            name = next((name for first, name, p in self._released if step < first and p.requires_grad), None)
        if name is not None:
            raise TrainingError(f"model: in step {step} {released_by_itself(name)}")


def released_by_itself(name: str) -> str:
    """What is wrong with a model that lets a frozen parameter require a gradient, and the cure."""
    return (
        f"it lets the frozen parameter {name!r} require a gradient, which no optimizer is there for: it would never be "
        "trained. Leave it trainable in the model's __init__, and say when its training begins: "
        f"'optimizer.groups=[{{match: {name}, from_step: 1000}}]'"
    )


def check_length(optimizer: torch.optim.Optimizer, total_steps: int) -> None:
    """Raise ConfigError for a group whose training begins after the run's end."""
    for group in optimizer.param_groups:
        first = group.get(FROM_STEP, 1)
        if first > total_steps:
            raise ConfigError(
                f"optimizer.groups: from_step={first}: the run has {total_steps} steps, so {group['param_names'][0]!r} is "
                "never trained; take a smaller one, or freeze: true"
            )
