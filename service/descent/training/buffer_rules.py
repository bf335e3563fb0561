"""How each changing buffer of a model is combined over the slots, found out by running parts of a batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from descent.data.generators import own_generators
from descent.errors import ConfigError
from descent.training.buffers import HOW_TO_COMBINE, Rule, default_rule, is_torchs, owners_of
from descent.training.model_snapshot import ModelSnapshot

_CLOSE = 1e-4
"""Relative difference that rounding and another size of batch explain."""

Values = dict[str, Tensor]


def find_rules(
    model: nn.Module, names: Sequence[str], forward: Callable[[int, int], object], count: int, where: str
) -> tuple[Rule, ...]:
    """The rule of each buffer in `names`; the model, in training mode, is left as it was.

    A module may state its buffers' rules by an attribute `combine_buffers`, a dict from name to rule; torch's own
    modules are known. For others the values after two halves of a batch are compared with those after the
    whole. forward(first, stop): a forward in training on samples of which there are `count`; with fewer than 4
    nothing is found out, and `default_rule` holds.

    Raises ConfigError, named by `where`, for a buffer whose values can't be combined, and for a wrong statement.
    """
    owners = owners_of(model)
    rules = {name: _stated(*owners[name], where) for name in names}
    known = {name: default_rule(b) for name, b in model.named_buffers()}
    if count >= 4 and None in rules.values():
        half = count // 2
        parts = [_after(model, forward, *part) for part in ((0, half), (half, 2 * half), (0, 2 * half))]
        start = {name: b.detach().clone() for name, b in model.named_buffers()}
        for name in (n for n, rule in rules.items() if rule is None):
            found = _compare(start[name], *(part[name] for part in parts))
            if found is None and _is_running_average(model, forward, half, name, parts[0][name]):
                found = Rule.MEAN
            if found is None:
                how = HOW_TO_COMBINE.format(name=name.rpartition(".")[2])
                raise ConfigError(
                    f"{where}: its forward changes the buffer {name!r} into something that is neither the same for "
                    "every part of a batch nor an average, a total, a maximum or a minimum over samples, so the "
                    f"parts that workers compute can't be put together; {how}"
                )
            rules[name] = found
    return tuple(rules[name] or known[name] for name in names)


def _stated(module: nn.Module, name: str, where: str) -> Rule | None:
    """The rule that is known without looking; None where there is none."""
    buffer = module._buffers[name]
    assert buffer is not None
    stated = getattr(module, "combine_buffers", {})
    if isinstance(stated, dict) and name in stated:
        if stated[name] not in list(Rule):
            raise ConfigError(
                f"{where}: combine_buffers says {stated[name]!r} for {name!r}; it may say {', '.join(Rule)}"
            )
        return Rule(stated[name])
    return default_rule(buffer) if is_torchs(module) else None


def _after(model: nn.Module, forward: Callable[[int, int], object], first: int, stop: int) -> Values:
    """The buffers after one forward from now; the model is left as it was."""
    before = ModelSnapshot.of(model)
    with torch.no_grad(), own_generators(seed=0):
        forward(first, stop)
    found = {name: b.detach().clone() for name, b in model.named_buffers()}
    before.put_back(model)
    return found


def _compare(start: Tensor, first: Tensor, second: Tensor, whole: Tensor) -> Rule | None:
    """The rule by which the values after two halves give those after the whole; None where none does."""
    if torch.equal(first, second) and torch.equal(first, whole):
        return Rule.SAME
    if start.is_complex():
        start, first, second, whole = (torch.view_as_real(t.resolve_conj()) for t in (start, first, second, whole))
    rounds = start.is_floating_point()
    kind = torch.float64 if rounds else torch.int64
    start, first, second, whole = (t.to(kind) for t in (start, first, second, whole))
    scale = float((first - second).abs().double().nan_to_num(0.0, 0.0, 0.0).max()) if rounds else 0.0

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=_CLOSE, atol=_CLOSE * scale) if rounds else torch.equal(a, b)

    if rounds and same(whole, (first + second) / 2):
        return Rule.MEAN
    if same(whole, first + second - start):
        return Rule.SUM
    if same(whole, torch.maximum(first, second)):
        return Rule.MAX
    return Rule.MIN if same(whole, torch.minimum(first, second)) else None


def _is_running_average(
    model: nn.Module, forward: Callable[[int, int], object], count: int, name: str, begin: Tensor
) -> bool:
    """Whether each entry becomes c · (its value before) + something of the samples, with one c between 0 and 1.

    So does every exponential average, of whatever is averaged: a variance too, whose values for two halves don't
    average to that of the whole. A maximum doesn't.
    """
    if not (begin.is_floating_point() or begin.is_complex()) or not bool(begin.abs().isfinite().all()):
        return False
    module, short = owners_of(model)[name]
    before = ModelSnapshot.of(model)
    step = 1e3 * (1.0 + float(begin.abs().max()))
    ends = []
    for shift in (-step, 0.0, step):
        module._buffers[short] = begin + shift
        ends.append(_after(model, forward, 0, count)[name].to(torch.complex128))
    before.put_back(model)
    low, middle, high = ends
    share = (high - low) / (2 * step)
    straight = (low + high - 2 * middle).abs() <= 1e-3 * step
    return bool((straight & (share.real > 1e-4) & (share.real < 1 - 1e-4)).all())
