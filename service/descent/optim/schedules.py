"""Learning-rate schedules: pure functions from a step to a multiplier of the base rate.

`schedule(step)` is the multiplier of update number `step`, 0 for the first. All schedules have
the same warm-up: over the first W = `warmup_steps` updates the multiplier rises in equal parts,

    m(step) = (step + 1) / W · f(0),      step < W

so the first update has 1/W of the rate and the last update of the warm-up has all of it. The
schedule itself is counted from there:

    m(step) = f(t),   t = step − W

A schedule that depends on the length of the run uses T = `total_steps` − W, the steps after the
warm-up, and keeps its last value beyond them. The lengths `step_size`, `milestones` and `period`
are whole steps, or shares of T if they lie between 0 and 1. Where torch has the same schedule,
its scheduler gives the same values (`LinearLR(1 / W, total_iters=W − 1)` before them in a
`SequentialLR`); only the learning rate is scheduled, never the momentum.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from descent.optim.plateau import Plateau
from descent.optim.schedule import Schedule, refuse

__all__ = [
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Exponential",
    "InverseSquareRoot",
    "MultiStep",
    "OneCycle",
    "Plateau",
    "Polynomial",
    "Schedule",
    "Step",
    "WarmupStableDecay",
]


@dataclass(frozen=True)
class Constant(Schedule):
    """f(t) = 1

    >>> [Constant(warmup_steps=4)(s) for s in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    def _after(self, t: int) -> float:  # noqa: ARG002
        return 1.0


@dataclass(frozen=True)
class Step(Schedule):
    """f(t) = gamma ^ ⌊t / step_size⌋

    >>> [Step(step_size=2, gamma=0.5)(s) for s in range(6)]
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """

    step_size: float = 0.25
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in_range("gamma", 0.0, 1.0, open_low=True)
        self._steps_of("step_size", self.step_size)

    def _after(self, t: int) -> float:
        return float(self.gamma ** (t // self._steps_of("step_size", self.step_size)))


@dataclass(frozen=True)
class MultiStep(Schedule):
    """f(t) = gamma ^ (number of milestones ≤ t)

    >>> [MultiStep(milestones=(2, 5), gamma=0.5)(s) for s in range(7)]
    [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]
    >>> MultiStep(milestones=(0.5, 0.75), gamma=0.5, total_steps=8)(6)
    0.25
    """

    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in_range("gamma", 0.0, 1.0, open_low=True)
        if not isinstance(self.milestones, list | tuple) or not self.milestones:
            raise refuse("milestones", self.milestones, "a list of steps, or of shares of the run")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        at = self._at()
        if list(at) != sorted(at):
            raise refuse("milestones", list(self.milestones), "rising steps")

    def _at(self) -> tuple[int, ...]:
        return tuple(self._steps_of("milestones", m) for m in self.milestones)

    def _after(self, t: int) -> float:
        return float(self.gamma ** sum(m <= t for m in self._at()))


@dataclass(frozen=True)
class Exponential(Schedule):
    """f(t) = max(gamma ^ t, min_multiplier)

    >>> [Exponential(gamma=0.5)(s) for s in range(4)]
    [1.0, 0.5, 0.25, 0.125]
    """

    gamma: float = 0.999
    min_multiplier: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in_range("gamma", 0.0, 1.0, open_low=True)
        self._in_range("min_multiplier", 0.0, 1.0)

    def _after(self, t: int) -> float:
        return float(max(self.gamma**t, self.min_multiplier))


@dataclass(frozen=True)
class Polynomial(Schedule):
    """f(t) = m + (1 − m) · (1 − t/T) ^ power,   m = min_multiplier; linear for power 1

    >>> [Polynomial(total_steps=4, power=2.0)(s) for s in range(5)]
    [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """

    power: float = 1.0
    min_multiplier: float = 0.0

    needs_total: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in_range("power", 0.0, math.inf, open_low=True)
        self._in_range("min_multiplier", 0.0, 1.0)

    def _after(self, t: int) -> float:
        falling = (1.0 - self._progress(t)) ** self.power
        return float(self.min_multiplier + (1.0 - self.min_multiplier) * falling)


@dataclass(frozen=True)
class Cosine(Schedule):
    """f(t) = m + (1 − m) · (1 + cos(π t/T)) / 2,   m = min_multiplier

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts",
    arXiv:1608.03983, without the restarts.

    >>> [round(Cosine(total_steps=4)(s), 4) for s in range(5)]
    [1.0, 0.8536, 0.5, 0.1464, 0.0]
    """

    min_multiplier: float = 0.0

    needs_total: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in_range("min_multiplier", 0.0, 1.0)

    def _after(self, t: int) -> float:
        return _cosine(1.0, self.min_multiplier, self._progress(t))


def _cosine(start: float, end: float, share: float) -> float:
    """The value at `share` (0 to 1) of the way from `start` to `end` along half a cosine."""
    return end + (start - end) * (1.0 + math.cos(math.pi * share)) / 2.0


@dataclass(frozen=True)
class CosineRestarts(Schedule):
    """f(t) = m + (1 − m) · (1 + cos(π u/P)) / 2,   u steps into a period of P

    The first period is `period` long, each next one `period_factor` times the one before
    (a whole number): arXiv:1608.03983.

    >>> [round(CosineRestarts(period=2, period_factor=2)(s), 4) for s in range(7)]
    [1.0, 0.5, 1.0, 0.8536, 0.5, 0.1464, 1.0]
    """

    period: float = 0.25
    period_factor: int = 1
    min_multiplier: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._steps_of("period", self.period)
        if type(self.period_factor) is not int or self.period_factor < 1:
            raise refuse("period_factor", self.period_factor, "a whole number, 1 or more")
        self._in_range("min_multiplier", 0.0, 1.0)

    def _after(self, t: int) -> float:
        period = self._steps_of("period", self.period)
        if self.period_factor == 1:
            t %= period
        while t >= period:
            t -= period
            period *= self.period_factor
        return _cosine(1.0, self.min_multiplier, t / period)


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Rises from 1/div_factor to 1 over the first pct_start of T, then falls to almost 0.

        f(t) = g(1/d, 1, t/e)                          t < e = pct_start · T − 1
               g(1, 1/(d·D), (t − e) / (T − 1 − e))    otherwise

    with d = div_factor, D = final_div_factor, g(a, b, x) half a cosine or a line from a to
    b. The peak is the base rate (torch's max_lr). torch's OneCycleLR also cycles the
    momentum by default; this is the schedule with cycle_momentum=False. Smith and Topin,
    "Super-Convergence", arXiv:1708.07120.

    >>> [round(OneCycle(total_steps=5, pct_start=0.6, div_factor=4.0)(s), 4) for s in range(5)]
    [0.25, 0.625, 1.0, 0.5, 0.0]
    """

    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    anneal: Literal["cos", "linear"] = "cos"

    needs_total: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in_range("pct_start", 0.0, 1.0)
        if self.pct_start == 1:
            raise refuse("pct_start", self.pct_start, "below 1, because the rate must fall again")
        self._in_range("div_factor", 1.0, math.inf)
        self._in_range("final_div_factor", 1.0, math.inf)
        self._one_of("anneal", ("cos", "linear"))

    def _after(self, t: int) -> float:
        last = self._length() - 1
        t = min(t, last)
        peak = self.pct_start * (last + 1) - 1.0
        low = 1.0 / self.div_factor
        if t < peak:
            return self._between(low, 1.0, t / peak)
        return self._between(1.0, low / self.final_div_factor, (t - peak) / (last - peak))

    def _between(self, start: float, end: float, share: float) -> float:
        if self.anneal == "cos":
            return _cosine(start, end, share)
        return start + (end - start) * share


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """1 until the last D = decay_share · total_steps steps, then falls to min_multiplier.

        f(t) = 1                               t ≤ T − D
               m + (1 − m) · h((T − t) / D)    otherwise,   m = min_multiplier

    with h(x) = x (linear), (1 − cos(πx)) / 2 (cosine) or 1 − √(1 − x) (sqrt). The length of a run
    need not be known at its start: Hu et al., "MiniCPM",
    arXiv:2404.06395; the forms of the decay: Hägele et al., arXiv:2405.18392.

    >>> [WarmupStableDecay(total_steps=8, warmup_steps=2, decay_share=0.5)(s) for s in range(9)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    decay_share: float = 0.2
    min_multiplier: float = 0.0
    decay: Literal["linear", "cosine", "sqrt"] = "linear"

    needs_total: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in_range("decay_share", 0.0, 1.0, open_low=True)
        self._in_range("min_multiplier", 0.0, 1.0)
        self._one_of("decay", ("linear", "cosine", "sqrt"))
        if self._decay_steps() > self._length():
            wanted = f"at most the share of the run that the warm-up of {self.warmup_steps} steps leaves"
            raise refuse("decay_share", self.decay_share, wanted)

    def _decay_steps(self) -> int:
        assert self.total_steps is not None
        return max(1, round(self.decay_share * self.total_steps))

    def _after(self, t: int) -> float:
        left = max(self._length() - t, 0) / self._decay_steps()
        if left >= 1.0:
            return 1.0
        shape = {
            "linear": left,
            "cosine": _cosine(0.0, 1.0, left),
            "sqrt": 1.0 - math.sqrt(1.0 - left),
        }[self.decay]
        return self.min_multiplier + (1.0 - self.min_multiplier) * shape


@dataclass(frozen=True)
class InverseSquareRoot(Schedule):
    """f(t) = √(s / (s + t)),   s = timescale, or warmup_steps where that is null

    With s = W it is the schedule of the first Transformer: √(W / step) after a linear
    warm-up (Vaswani et al., arXiv:1706.03762). It doesn't depend on the length of the run.

    >>> [round(InverseSquareRoot(warmup_steps=4)(s), 4) for s in (0, 3, 4, 8, 16)]
    [0.25, 1.0, 1.0, 0.7071, 0.5]
    """

    timescale: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timescale is None and self.warmup_steps == 0:
            raise refuse("timescale", "null", "a number of steps, where warmup_steps is 0")
        if self.timescale is not None:
            self._in_range("timescale", 0.0, math.inf, open_low=True)

    def _after(self, t: int) -> float:
        scale = self.warmup_steps if self.timescale is None else self.timescale
        return math.sqrt(scale / (scale + t))
