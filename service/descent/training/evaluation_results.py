"""The results of an evaluation set's chunks, reduced to those of the whole set: the same bits for any number of ranks.

Each chunk has one owner. What a chunk gives is a list of states: numbers that add up (or of which the largest or the
smallest counts), and rows, one a sample. The numbers of several chunks travel together and are combined in
the order of the chunks; the rows are gathered in the order of the samples.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from descent.errors import TrainingError
from descent.training.collectives import Group
from descent.training.results import Mean, Predictions, Result, Rows, Sum

_BLOCK = 1 << 19
"""Numbers that travel in one collective, at most (unless one round of chunks has more)."""
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.int32: torch.int32, torch.int64: torch.int64}

Part = Mapping[str, Tensor]
"""What one chunk gives: key of a state -> its tensor."""


class State(NamedTuple):
    """What is reduced under one key; plain values, so that a plan holds it."""

    key: str
    kind: str
    """How two parts are combined: "mean" (totals and counts add up), "sum", "max", "min", or "rows" (one after the other)."""
    dtype: str
    shape: tuple[int, ...]
    """Of a part; of rows, that of one row."""

    @property
    def size(self) -> int:
        """How many numbers a chunk sends: of rows, only how many there are."""
        return 1 if self.kind == "rows" else math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def states_of(results: Mapping[str, Result]) -> dict[str, tuple[str, Tensor]]:
    """{key: (kind, tensor)} of a task's results. Predictions are for metrics alone, and are left out."""
    found: dict[str, tuple[str, Tensor]] = {}
    for name, result in results.items():
        if isinstance(result, Mean):
            pair = [torch.as_tensor(x).detach().double().reshape(()).cpu() for x in (result.total, result.count)]
            found[name] = ("mean", torch.stack(pair))
        elif isinstance(result, Sum):
            found[name] = ("sum", torch.as_tensor(result.value).detach())
        elif isinstance(result, Rows):
            found[name] = ("rows", result.value.detach())
        else:
            assert isinstance(result, Predictions)
    return found


def described(parts: Mapping[str, tuple[str, Tensor]]) -> tuple[State, ...]:
    """The states of a first part, as all others must be."""
    return tuple(
        State(key, kind, str(t.dtype).removeprefix("torch."), tuple(t.shape[1:] if kind == "rows" else t.shape))
        for key, (kind, t) in parts.items()
    )


def reduce_parts(
    parts: Iterator[tuple[int, Mapping[str, tuple[str, Tensor]]]],
    states: Sequence[State],
    num_chunks: int,
    group: Group,
    where: str,
) -> dict[str, Tensor]:
    """The reduced tensor of each state, the same on every rank: a mean's is (total, count).

    parts: (chunk, what it gives), of the chunks rank, rank + world_size, … in this order. where: the task, for messages.
    Raises PeerLost, and TrainingError for a part that is not as described.
    """
    width = sum(state.size for state in states)
    rounds = -(-num_chunks // group.world_size)
    at_once = max(1, _BLOCK // max(1, width * group.world_size))
    totals: Tensor | None = None
    kept: dict[str, list[Tensor]] = {state.key: [] for state in states if state.kind == "rows"}
    lengths: list[Tensor] = []
    for first in range(0, rounds, at_once):
        count = min(at_once, rounds - first)
        block = torch.zeros(count * group.world_size, width, dtype=torch.float64)
        for row in range(group.rank, len(block), group.world_size):
            if first * group.world_size + row < num_chunks:
                _, part = next(parts)
                block[row] = _numbers(part, states, where)
                for key, rows in kept.items():
                    rows.append(part[key][1])
        block = group.sum_(block.to(group.device)).cpu()[: num_chunks - first * group.world_size]
        lengths.append(block)
        totals = _combined(totals, block, states)
    assert totals is not None
    counts = torch.cat([_columns(block, states, "rows") for block in lengths]).long()
    found: dict[str, Tensor] = {}
    place = index = 0
    for state in states:
        if state.kind == "rows":
            found[state.key] = _gathered(state, kept[state.key], counts[:, index].tolist(), group)
            index += 1
        else:
            numbers = totals[place : place + state.size]
            found[state.key] = numbers.view(state.shape).to(state.torch_dtype)
        place += state.size
    return found


def _numbers(part: Mapping[str, tuple[str, Tensor]], states: Sequence[State], where: str) -> Tensor:
    """What a chunk sends, [width] in float64. Raises TrainingError where the part is not as described."""
    if list(part) != [state.key for state in states]:
        raise TrainingError(
            f"{where}: its evaluation gives {', '.join(part)}, and gave {', '.join(s.key for s in states)} for the first batch"
        )
    pieces = []
    for state, (kind, tensor) in zip(states, part.values(), strict=True):
        shape = tuple(tensor.shape[1:] if kind == "rows" else tensor.shape)
        if (kind, shape) != (state.kind, state.shape):
            raise TrainingError(
                f"{where}: its evaluation gives {state.key!r} as a {kind} of the shape {list(shape)}, and gave a "
                f"{state.kind} of the shape {list(state.shape)} for the first batch"
            )
        if kind == "mean" and not 0.0 <= float(tensor[1]) < math.inf:
            raise TrainingError(
                f"{where}: its evaluation counts {float(tensor[1]):g} for {state.key!r}; a count is 0 or more"
            )
        pieces.append(torch.tensor([float(len(tensor))]) if kind == "rows" else tensor.double().reshape(-1).cpu())
    return torch.cat([piece.double() for piece in pieces]) if pieces else torch.zeros(0, dtype=torch.float64)


def _combined(totals: Tensor | None, block: Tensor, states: Sequence[State]) -> Tensor:
    """The totals with further chunks, [chunks, width], combined one after the other."""
    extremes = {kind: _mask(states, kind) for kind in ("max", "min") if any(s.kind == kind for s in states)}
    for row in block:
        if totals is None:
            totals = row.clone()
            continue
        summed = totals + row
        for kind, mask in extremes.items():
            chosen = torch.maximum(totals, row) if kind == "max" else torch.minimum(totals, row)
            summed = torch.where(mask, chosen, summed)
        totals = summed
    assert totals is not None
    return totals


def _mask(states: Sequence[State], kind: str) -> Tensor:
    return torch.cat([torch.full((state.size,), state.kind == kind) for state in states])


def _columns(block: Tensor, states: Sequence[State], kind: str) -> Tensor:
    return block[:, _mask(states, kind)] if states else block


def _gathered(state: State, own: list[Tensor], counts: list[int], group: Group) -> Tensor:
    """All rows, in the order of the chunks. counts: how many rows each chunk has."""
    starts = [sum(counts[:chunk]) for chunk in range(len(counts))]
    travels = state.torch_dtype if state.torch_dtype in _BITS else torch.float32
    if not state.torch_dtype.is_floating_point and travels is torch.float32:
        travels = torch.int64
    whole = torch.zeros(sum(counts), *state.shape, dtype=travels, device=group.device)
    for chunk, rows in zip(range(group.rank, len(counts), group.world_size), own, strict=True):
        whole[starts[chunk] : starts[chunk] + counts[chunk]] = rows.to(group.device, travels)
    if group.world_size > 1:  # a sum gathers them, since one rank has each row; of bits, because -0.0 + 0.0 is 0.0
        whole = group.sum_(whole.view(_BITS[travels])).view(travels)
    return whole.to(state.torch_dtype)


def as_figures(reduced: Mapping[str, Tensor], states: Sequence[State], where: str) -> dict[str, Any]:
    """What a task's `compute` is given: a mean as a float, sums and rows as tensors. A mean of nothing is left out.

    The loss may be a sum: its count is then 0, and its total is given. Raises TrainingError for odd names.
    """
    figures: dict[str, Any] = {}
    for state in states:
        if not state.key.replace("_", "").replace("-", "").replace("/", "").replace(".", "").replace(" ", "").isalnum():
            raise TrainingError(f"{where}: {state.key!r} can't be a metric's name: use letters, digits, _ - . and /")
        value = reduced[state.key]
        if state.kind != "mean":
            figures[state.key] = value
        elif value[1]:
            figures[state.key] = float(value[0]) / float(value[1])
        elif state.key == "loss":
            figures[state.key] = float(value[0])
    return figures
