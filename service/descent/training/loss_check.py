"""What a loss's number for a batch means, found out by asking it, before any worker exists.

A step computes its batch in parts, so a loss must be known as numbers that add up over the parts. A
loss that is read wrongly trains on other numbers without a word; so each is read right or refused by name.
"""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from descent.data.generators import own_generators
from descent.errors import ConfigError
from descent.training.objective import LossSum, Objective, Reading

_PRECISE, _ROUGH = 1e-5, 1e-3
"""Relative difference that rounding explains, where the comparison is computed in float64 and in float32."""

Samples = tuple[Tensor, Tensor]
"""(outputs [n, …], targets [n, …])."""


@torch.no_grad()
def settle(objective: Objective, output: Tensor, target: Tensor, where: str, *, whole: bool) -> Objective:
    """`objective` with the reading that fits its loss, or ConfigError with what to change.

    output: [n, …], the model's for a few samples. where: the key and the class, for messages.
    whole: whether each step's batch is computed in one forward, so that nothing has to add up.
    """
    samples = objective.fitted(output.detach(), target)
    draws = _check_repeats(objective.as_built, samples, where)
    value = objective.as_built(*samples)
    if objective.reading is Reading.SAMPLES and isinstance(value, tuple | list):
        objective = replace(objective, reading=Reading.PAIR)
        check_pair(value, where)
    if draws or whole or len(output) < 2:
        return objective
    precise = _in_float64(objective, output.detach(), target)
    if precise is None:
        return _read(objective, output.detach(), target, where, _ROUGH)
    return replace(objective, reading=_read(*precise, where, _PRECISE).reading)


def _read(objective: Objective, output: Tensor, target: Tensor, where: str, tolerance: float) -> Objective:
    """Compare the loss of all samples with that of their parts. Raises ConfigError where nothing adds up."""
    n = len(output)
    for cut in {1, n // 2, n // 3 or 1}:
        parts = [(output[:cut], target[:cut]), (output[cut:], target[cut:])]
        try:
            objective = _read_parts(objective, (output, target), parts, where, tolerance)
        except ConfigError:
            raise
        except Exception as error:  # such as a loss that can't take one sample
            raise ConfigError(
                f"{where}: takes {n} samples, but not {cut} and {n - cut} of them ({type(error).__name__}), and a "
                f"batch is computed in parts: {_WHOLE}"
            ) from error
    return objective


_WHOLE = (
    "if the loss compares the samples of a batch with each other, compute each batch whole, with slots=1, workers=1 "
    "and batch.micro_size=auto"
)


def _read_parts(
    objective: Objective, samples: Samples, parts: list[Samples], where: str, tolerance: float
) -> Objective:
    def close(a: float, b: float, scale: float) -> bool:
        return abs(a - b) <= tolerance * max(abs(a), abs(b), scale) + 1e-9

    if objective.reading in (Reading.TERMS, Reading.PAIR):
        total, terms = _numbers(objective(*samples))
        pieces = [_numbers(objective(*part)) for part in parts]
        added = [sum(piece[0] for piece in pieces), sum(piece[1] for piece in pieces)]
        if not all(map(math.isfinite, (total, terms, *added))):
            return objective
        size = sum(abs(piece[0]) for piece in pieces)
        if not (close(total, added[0], size) and close(terms, added[1], 0.0)):
            raise ConfigError(
                f"{where}: its (total, count) don't add up: {len(samples[0])} samples give ({total:.6g}, {terms:.6g}), "
                f"their parts together ({added[0]:.6g}, {added[1]:.6g}); {_WHOLE}"
            )
        if objective.reading is Reading.TERMS and terms:
            built = float(objective.as_built(*objective.fitted(*samples)))
            if math.isfinite(built) and not close(total / terms, built, 0.0):
                raise ConfigError(
                    f"{where}: gives {built:.6g} for samples whose sum {total:.6g} over {terms:.6g} terms is "
                    f"{total / terms:.6g}: Descent doesn't know what this loss divides by; wrap it in a function of "
                    "your own that returns (total, count)"
                )
        return objective
    built = float(objective.as_built(*objective.fitted(*samples)))
    pieces = [(float(objective.as_built(*objective.fitted(*part))), len(part[0])) for part in parts]
    mean = sum(value * count for value, count in pieces) / len(samples[0])
    total = sum(value for value, _ in pieces)
    if not all(map(math.isfinite, (built, mean, total))):
        return objective
    size = max(abs(value) for value, _ in pieces)
    is_mean, is_total = close(built, mean, size), close(built, total, size)
    if objective.reading is Reading.SAMPLES and is_mean:
        return objective
    if is_total:
        return replace(objective, reading=Reading.TOTAL)
    raise ConfigError(
        f"{where}: its number for a batch is neither the mean nor the sum over the batch's samples: {len(samples[0])} "
        f"samples give {built:.6g}, their parts {pieces[0][0]:.6g} ({pieces[0][1]} samples) and {pieces[1][0]:.6g} "
        f"({pieces[1][1]}), whose mean is {mean:.6g}. A batch is computed in parts, so this would train on other "
        f"numbers. Let the loss return (total, count), which both add up over samples; or, {_WHOLE}"
    )


def _numbers(loss: LossSum) -> tuple[float, float]:
    return float(loss.total), float(loss.terms)


def _in_float64(objective: Objective, output: Tensor, target: Tensor) -> tuple[Objective, Tensor, Tensor] | None:
    """The same in float64, so that rounding explains little; None for a loss that can't compute there."""
    if not output.is_floating_point():
        return None

    def double(loss: Callable[..., Any]) -> Callable[..., Any]:
        return deepcopy(loss).double() if isinstance(loss, nn.Module) else loss

    try:
        precise = replace(objective, loss=double(objective.loss), as_built=double(objective.as_built))
        target = target.double() if target.is_floating_point() else target
        precise(output.double(), target)
    except Exception:
        return None
    return precise, output.double(), target


def check_pair(value: Any, where: str) -> None:
    """Raise ConfigError unless `value` is (total, count), each one number, the count not negative."""
    numbers = [v for v in value if isinstance(v, Tensor | int | float) and (not isinstance(v, Tensor) or v.dim() == 0)]
    if len(numbers) != 2 or len(value) != 2 or not isinstance(value[0], Tensor):
        shapes = ", ".join(f"{list(v.shape)}" if isinstance(v, Tensor) else type(v).__name__ for v in value)
        raise ConfigError(f"{where}: gives ({shapes}), Descent needs one number a batch, or (total, count)")
    if not (math.isfinite(float(value[1])) and float(value[1]) >= 0):
        raise ConfigError(f"{where}: gives (total, count) with the count {float(value[1]):g}; it must be 0 or more")


def refuse_unseeded(first: object, second: object, where: str, seed: int) -> None:
    """Raise ConfigError where two losses built from one config and seed keep different numbers."""
    one, other = dict(numbers_kept(first)), dict(numbers_kept(second))
    differs = next((name for name in one if one[name] != other.get(name)), None)
    if differs is not None:
        raise ConfigError(
            f"{where}: two of them built with seed={seed} differ in {differs!r}: its __init__ draws from a generator of "
            "its own that nothing seeds, or depends on the time; draw from torch's, random's or np.random's global "
            "generator, or seed the own one"
        )


def _check_repeats(loss: Callable[..., Any], samples: Samples, where: str) -> set[str]:
    """Call the loss twice: refuse one that keeps something or draws from a generator that nothing seeds.

    Returns the generators from which the loss draws: "python", "numpy", "torch".
    """
    before = dict(numbers_kept(loss))
    with torch.no_grad():
        with own_generators(seed=0) as drew:
            first = loss(*samples)
            drawn = drew()
        with own_generators(seed=0):
            second = loss(*samples)
    after = dict(numbers_kept(loss))
    changed = next((name for name in after if before.get(name) != after[name]), None)
    if changed is not None:
        raise ConfigError(
            f"{where}: changes its own {changed!r} from call to call, which no checkpoint holds and which differs from "
            "worker to worker; make it a function of outputs and targets, or move it into the model as a buffer"
        )
    if _signature(first) != _signature(second):
        raise ConfigError(
            f"{where}: gives another number when it is called again with the same outputs, targets and seeds: it keeps "
            "something, or draws from a generator of its own that nothing seeds; draw from torch's, random's or "
            "np.random's global generator, which are seeded for each step and slot"
        )
    return drawn


def numbers_kept(owner: object, prefix: str = "", depth: int = 3) -> Iterator[tuple[str, object]]:
    """(name, value) of the numbers and tensors that an object keeps, those of its modules and closures too."""
    named = dict(getattr(owner, "__dict__", {}))
    for part in ("_parameters", "_buffers", "_modules"):
        named.update(named.pop(part, None) or {})
    code, cells = getattr(owner, "__code__", None), getattr(owner, "__closure__", None) or ()
    if code is not None:
        for name, cell in zip(code.co_freevars, cells, strict=True):
            try:
                named[name] = cell.cell_contents
            except ValueError:  # not filled yet
                continue
    for name, value in named.items():
        if isinstance(value, Tensor | int | float | str | bool | None | list | tuple | dict):
            yield prefix + name, _signature(value)
        elif depth and (isinstance(value, nn.Module) or type(value).__module__ not in ("builtins", "types")):
            yield from numbers_kept(value, f"{prefix}{name}.", depth - 1)


def _signature(value: object) -> object:
    """Something to compare two values by, NaN equal to NaN."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return (str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    if isinstance(value, list | tuple):
        return [_signature(v) for v in value]
    if isinstance(value, dict):
        return [(str(k), _signature(v)) for k, v in value.items()]
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__
