"""The only schedule with a state: it lowers the learning rate when the evaluation loss stops falling."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

from descent.errors import CheckpointError, ConfigError

_STATE_KEYS = ("multiplier", "num_bad", "cooldown_left")


class Plateau:
    """Multiplies the learning rate by `factor` after more than `patience` evaluations without progress.

    Progress is a value of `metric`, an evaluation's figure, below best − threshold · |best| (`threshold_mode: rel`)
    or below best − threshold (`abs`); with mode="max", above. The `cooldown` evaluations after a reduction are not
    counted. This is torch's ReduceLROnPlateau with mode="min", eps=0, preceded by the linear
    warm-up of every schedule over the first W = `warmup_steps` updates:

        m(step) = (step + 1) / W · multiplier,  step < W;   multiplier afterwards

    `total_steps` is accepted because all schedules are built alike; it has no effect.

    Raises ConfigError for an argument out of range, naming its key.

    >>> schedule = Plateau(factor=0.5, patience=1)
    >>> for loss in (1.0, 0.9, 0.9, 0.9):
    ...     schedule.observe(loss)
    >>> schedule(100)
    0.5
    """

    def __init__(
        self,
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_multiplier: float = 0.0,
        warmup_steps: int = 0,
        total_steps: int | None = None,  # noqa: ARG002
        metric: str = "eval/loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        _number("factor", factor, "above 0 and below 1", lambda v: 0.0 < v < 1.0)
        _number("threshold", threshold, "from 0 on, and finite", lambda v: 0.0 <= v < math.inf)
        _number("min_multiplier", min_multiplier, "from 0 up to 1", lambda v: 0.0 <= v <= 1.0)
        _whole("patience", patience)
        _whole("cooldown", cooldown)
        _whole("warmup_steps", warmup_steps)
        if threshold_mode not in ("rel", "abs"):
            raise ConfigError(f"schedule.threshold_mode={threshold_mode}: must be one of rel, abs")
        if mode not in ("min", "max"):
            raise ConfigError(f"schedule.mode={mode}: must be one of min, max")
        self.metric, self.mode = metric, mode
        self.factor = factor
        self.patience = patience
        self.threshold = threshold
        self.threshold_mode = threshold_mode
        self.cooldown = cooldown
        self.min_multiplier = min_multiplier
        self.warmup_steps = warmup_steps
        self._multiplier = 1.0
        self._best = math.inf
        self._num_bad = 0
        self._cooldown_left = 0

    def __call__(self, step: int) -> float:
        """The multiplier of update number `step` (0 for the first), given the evaluations so far."""
        assert step >= 0, step
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps * self._multiplier
        return self._multiplier

    def observe(self, value: float) -> None:
        """Record the metric of an evaluation, mostly the loss. NaN counts as no progress."""
        value = -value if self.mode == "max" else value
        if self._is_progress(value):
            self._best = value
            self._num_bad = 0
        else:
            self._num_bad += 1
        if self._cooldown_left > 0:
            self._cooldown_left -= 1
            self._num_bad = 0
        if self._num_bad > self.patience:
            self._multiplier = max(self._multiplier * self.factor, self.min_multiplier)
            self._cooldown_left = self.cooldown
            self._num_bad = 0

    def _is_progress(self, loss: float) -> bool:
        if math.isinf(self._best):
            return loss < self._best
        if self.threshold_mode == "rel":
            return (
                loss < self._best - self.threshold * abs(self._best)
                if self._best < 0
                else loss < self._best * (1.0 - self.threshold)
            )
        return loss < self._best - self.threshold

    def state_dict(self) -> dict[str, float]:
        """The whole state, as numbers that JSON can hold; `best` is left out before the first evaluation."""
        state: dict[str, float] = {
            "multiplier": self._multiplier,
            "num_bad": self._num_bad,
            "cooldown_left": self._cooldown_left,
        }
        if math.isfinite(self._best):
            state["best"] = self._best
        return state

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a state. Raises CheckpointError if it was written by another schedule."""
        missing = [key for key in _STATE_KEYS if key not in state]
        if missing:
            raise CheckpointError(
                f"the state has no {missing[0]!r} of the plateau schedule: it was written with another schedule"
            )
        self._multiplier = float(state["multiplier"])
        self._num_bad = int(state["num_bad"])
        self._cooldown_left = int(state["cooldown_left"])
        self._best = float(state.get("best", math.inf))


def _number(key: str, value: object, wanted: str, fits: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
        raise ConfigError(f"schedule.{key}={value}: must be a number {wanted}")


def _whole(key: str, value: object) -> None:
    if type(value) is not int or value < 0:
        raise ConfigError(f"schedule.{key}={value}: must be a whole number, 0 or more")
