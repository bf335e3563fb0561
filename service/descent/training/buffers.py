"""Buffers that the forward changes: every slot begins with the step's first values, and the step ends with one value."""

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor, nn

from descent.errors import TrainingError
from descent.optim.memory_layout import shares_places

Owners = dict[str, tuple[nn.Module, str]]
"""Name of a buffer in the model -> the module that holds it, and its name there."""


class Rule(StrEnum):
    """What becomes of the values that a step's slots leave in one buffer, per entry."""

    MEAN = "mean"
    """Their mean: running averages, such as batch norm's."""
    SAME = "same"
    """The first slot's: counters of forwards, flags, whatever doesn't depend on the samples."""
    SUM = "sum"
    """The step's first value and what every slot added to it: totals over samples."""
    MAX = "max"
    MIN = "min"


def owners_of(model: nn.Module) -> Owners:
    """Who holds which buffer."""
    return {
        f"{path}.{name}".lstrip("."): (module, name)
        for path, module in model.named_modules()
        for name in module._buffers
    }


def is_torchs(module: nn.Module) -> bool:
    """Whether the module's class, or the class from which it has its forward, is torch's own."""
    home = next((c for c in type(module).__mro__ if "forward" in vars(c)), object)
    return home.__module__.startswith("torch.")


def own_buffer(module: nn.Module, name: str) -> Tensor:
    """A module's buffer, in memory that can be written to entry by entry: an expanded tensor is replaced by a copy."""
    buffer = module._buffers[name]
    assert buffer is not None
    scattered = not buffer.is_contiguous() and (buffer.dtype in _WIDE or shares_places(buffer))
    if scattered or buffer.is_conj():
        buffer = module._buffers[name] = buffer.resolve_conj().clone(memory_format=torch.contiguous_format)
    return buffer


_WIDE = (torch.int64, torch.uint64)
"""Whole numbers that float64 can't hold: they travel as two halves of 32 bits."""


def _travelling(buffer: Tensor) -> Tensor:
    """The buffer's memory as numbers that float64 holds exactly: a view."""
    if buffer.is_complex():
        return torch.view_as_real(buffer)
    return buffer.unsqueeze(-1).view(torch.int32) if buffer.dtype in _WIDE else buffer


def _values(rows: Tensor, buffer: Tensor) -> Tensor:
    """[slots, row] as it travelled, in the buffer's shape and a dtype that holds its values: [slots, …]."""
    if buffer.dtype in _WIDE:
        halves = rows.view(len(rows), -1, 2).long()
        return ((halves[..., 1] << 32) | (halves[..., 0] & 0xFFFFFFFF)).view(len(rows), *buffer.shape)
    if buffer.is_complex():
        return torch.view_as_complex(rows.view(len(rows), *buffer.shape, 2))
    return rows.view(len(rows), *buffer.shape)


class Buffers:
    """The changing buffers of a model, independent of which rank computes which slot.

    Each slot starts with the values of the step's start, as it would on a rank of its own. The values
    that the slots leave are combined in slot order, each buffer by its rule. A module may write
    a buffer in place or put another tensor in its place.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], rules: Sequence[Rule] | None = None) -> None:
        """names: the buffers that the forward changes. rules: one each; None: the mean, and SAME for whole numbers."""
        owners = owners_of(model)
        self._names = list(names)
        self._places = [owners[name] for name in names]
        kept = model.state_dict(keep_vars=True).keys() & owners.keys()
        self._constants = [(name, *owners[name]) for name in sorted(kept - set(names))]
        self._versions: list[tuple[int, int]] = []
        self._moved = False
        """Whether a forward of this step may have changed them."""
        self._views: list[tuple[Tensor | None, Tensor]] = [(None, torch.empty(0))] * len(names)
        """Per buffer the tensor seen last, and its memory as it travels."""
        sizes = [_travelling(b).numel() for b in self._buffers]
        self.row_length = sum(sizes)
        """Numbers that `pack` gives."""
        if not self.row_length:
            return
        self._rules = list(rules) if rules is not None else [default_rule(b) for b in self._buffers]
        # One call for all of them: a deep network has dozens, and each call of its own costs.
        self._start = [b.clone() for b in self._buffers]
        device = self._start[0].device
        self._row = torch.empty(self.row_length, dtype=torch.float64, device=device)
        """All of them side by side, [row length]."""
        pieces = zip(self._row.split(sizes), self._start, strict=True)
        self._pieces = [piece.view(_travelling(b).shape) for piece, b in pieces]
        rules_and_sizes = list(zip(self._rules, sizes, strict=True))
        self._first = torch.cat([torch.full((n,), rule is not Rule.MEAN, device=device) for rule, n in rules_and_sizes])
        """[row length]: which entries are not averaged."""
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self._ranges = list(zip([0, *ends[:-1]], ends, strict=True))
        parts = zip(self._names, self._places, self._rules, self._ranges, strict=True)
        self._special = [i for i, rule in enumerate(self._rules) if rule not in (Rule.MEAN, Rule.SAME)]
        self._to_agree = [(n, lo, hi) for n, (m, _), rule, (lo, hi) in parts if rule is Rule.SAME and not is_torchs(m)]
        """(name, its range in a row) of the buffers in which the slots must agree; torch's own modules are known."""

    @property
    def _buffers(self) -> list[Tensor]:
        return [
            buffer
            if (buffer := module._buffers[name]) is not None and buffer.is_contiguous() and not buffer.is_conj()
            else own_buffer(module, name)
            for module, name in self._places
        ]

    def _as_they_travel(self) -> list[Tensor]:
        """The memory of each buffer as `_travelling` gives it; made anew only for a tensor that is another one."""
        for index, buffer in enumerate(self._buffers):
            if self._views[index][0] is not buffer:
                self._views[index] = (buffer, _travelling(buffer))
        return [view for _, view in self._views]

    def _now(self) -> list[tuple[int, int]]:
        return [(id(t := module._buffers[name]), 0 if t is None else t._version) for _, module, name in self._constants]

    def begin_step(self) -> None:
        """A step begins with the values of now."""
        self._versions = self._now()
        self._moved = False
        if self.row_length:
            torch._foreach_copy_(self._start, self._buffers)

    def begin_slot(self) -> None:
        """A slot begins with the values of the step's start."""
        if self._moved:
            self.restart()
        self._moved = True

    def restart(self) -> None:
        """Back to the values of the step's start."""
        if self.row_length:
            torch._foreach_copy_(self._buffers, self._start)

    def check_constants(self, step: int) -> None:
        """Raises TrainingError where a buffer that is taken for a constant was written since the step began."""
        for (name, _, _), before, now in zip(self._constants, self._versions, self._now(), strict=True):
            if before != now:
                raise TrainingError(
                    f"model: its buffer {name!r} changes from step {step} on, and was not written by the first "
                    "forward, when it was found out which do; write it in every forward in training "
                    "(add_(0) where there is nothing to change)"
                )

    def check_agreement(self, rows: Tensor, forwards: Sequence[int], step: int) -> None:
        """Raises TrainingError where slots with equally many forwards leave different values that must be the same.

        rows: [slots, row length]. forwards: per slot its number.
        """
        if not self.row_length or not self._to_agree:
            return
        first = {count: slot for slot, count in reversed(list(enumerate(forwards)))}
        like = [first[count] for count in forwards]
        for name, lo, hi in self._to_agree:
            if not torch.equal(rows[:, lo:hi], rows[like, lo:hi]):
                raise TrainingError(
                    f"model: its buffer {name!r} depends on the samples from step {step} on, and did not when it was "
                    f"found out; {HOW_TO_COMBINE.format(name=name.rpartition('.')[2])}"
                )

    def pack(self) -> Tensor:
        """The values of now, [row length] in float64, exact for every dtype; valid until the next call."""
        torch._foreach_copy_(self._pieces, self._as_they_travel())
        return self._row

    def combine(self, rows: Tensor) -> None:
        """Take the one value that follows from those of the slots, [slots, row length]."""
        if not self.row_length:
            return
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        total /= rows.shape[0]
        self._row.copy_(torch.where(self._first, rows[0], total))
        torch._foreach_copy_(self._as_they_travel(), self._pieces)
        for index in self._special:
            buffer, start, rule, (lo, hi) = (
                self._buffers[index],
                self._start[index],
                self._rules[index],
                self._ranges[index],
            )
            values = _values(rows[:, lo:hi], buffer)
            if rule is Rule.SUM:
                first = start.to(values.dtype)
                values = first + (values - first).sum(0)
            else:
                values = values.amax(0) if rule is Rule.MAX else values.amin(0)
            buffer.copy_(values)


HOW_TO_COMBINE = (
    "say how the values of a batch's parts are combined, by an attribute of its module: combine_buffers = "
    "{{{name!r}: 'mean'}}, or 'sum', 'max', 'min' or 'same' (the first part's); or use slots=1 workers=1"
)


def default_rule(buffer: Tensor) -> Rule:
    """The rule of a buffer of which nothing else is known."""
    return Rule.MEAN if buffer.is_floating_point() or buffer.is_complex() else Rule.SAME
