"""The base class of schedules: the warm-up, and the checks of the arguments."""

import math
from dataclasses import dataclass
from typing import ClassVar

from descent.errors import ConfigError


def refuse(key: str, value: object, wanted: str) -> ConfigError:
    """A ConfigError for an argument out of range; `key` is relative to `schedule`."""
    return ConfigError(f"schedule.{key}={value}: must be {wanted}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Schedule:
    """A pure function from a step to a multiplier; a subclass defines the part after the warm-up.

    Raises ConfigError at construction for an argument out of range, naming its key.
    """

    warmup_steps: int = 0
    total_steps: int | None = None

    needs_total: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if type(self.warmup_steps) is not int or self.warmup_steps < 0:
            raise refuse("warmup_steps", self.warmup_steps, "a whole number of steps, 0 or more")
        total = self.total_steps
        if total is not None and (type(total) is not int or total < 1):
            raise refuse("total_steps", total, "a whole number of steps, at least 1")
        if self.needs_total:
            self._length()

    def __call__(self, step: int) -> float:
        """The multiplier of update number `step`, 0 for the first."""
        assert step >= 0, step
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps * self._after(0)
        return self._after(step - self.warmup_steps)

    def _after(self, t: int) -> float:
        """f(t), the multiplier t steps after the warm-up."""
        raise NotImplementedError

    def _length(self) -> int:
        """T, the number of steps after the warm-up."""
        if self.total_steps is None:
            raise ConfigError(
                "schedule.total_steps=null: is filled in by the run with its number of steps; "
                "outside of a run it must be given"
            )
        if self.warmup_steps >= self.total_steps:
            raise refuse("warmup_steps", self.warmup_steps, f"below the run's {self.total_steps} steps")
        return self.total_steps - self.warmup_steps

    def _progress(self, t: int) -> float:
        length = self._length()
        return min(t, length) / length

    def _steps_of(self, key: str, value: float) -> int:
        """`value` in steps: a whole number is a number of steps, one between 0 and 1 a share of T."""
        if type(value) is int and value >= 1:
            return value
        if type(value) is float and 0.0 < value < 1.0:
            return max(1, round(value * self._length()))
        raise refuse(key, value, "whole steps (1 or more), or a share of the run (between 0 and 1)")

    def _in_range(self, key: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, key)
        if not _is_number(value) or not low <= value <= high or (open_low and value == low):
            edge = "above" if open_low else "from"
            upper = f" up to {high:g}" if math.isfinite(high) else ""
            raise refuse(key, value, f"a number {edge} {low:g}{upper}")

    def _one_of(self, key: str, choices: tuple[str, ...]) -> None:
        if getattr(self, key) not in choices:
            raise refuse(key, getattr(self, key), f"one of {', '.join(choices)}")
