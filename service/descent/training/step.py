"""One optimizer step: forward, totals, backward and reduction of each micro-batch, then clipping and the update.

A step commits on all ranks or on none. Everything that can fail happens before the update, and the
numbers that decide about the update (losses, votes) reach every rank in one small vector that travels
beside the gradients.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from descent.data.batch import Batch
from descent.errors import TrainingError
from descent.training.buffers import Buffers
from descent.training.collectives import Group, PeerLost
from descent.training.coupling import Coupling
from descent.training.determinism import begin_stream
from descent.training.freezing import Freezing
from descent.training.input.sampling import stream_seed
from descent.training.reduction import Reducer
from descent.training.results import MicroBatchLoss
from descent.training.sentinel import Sentinel
from descent.training.step_totals import ReducedTotals, StepTotals
from descent.training.stopwatch import Stopwatch

SlotRange = tuple[int, tuple[int, int]]
"""(slot, the half-open range of the global batch that the slot covers)."""


class HalfUpdated(TrainingError):
    """The optimizer's update failed in the middle: this replica must receive the state anew."""


class BatchSource(Protocol):
    """Where the step takes its samples from; the trainer's `Feed`."""

    def fetch(self, step: int, first: int, stop: int) -> Batch:
        """Samples first … stop-1 of the step's global batch, on the device."""
        ...


class MicroBatch(NamedTuple):
    """Samples that go through the model in one forward and one backward; all of them belong to one slot."""

    slot: int
    first: int
    """The first sample's place in the step's global batch."""
    stop: int
    """The place after the last sample's."""
    begins_slot: bool
    ends_slot: bool
    last: bool
    """Whether this is the rank's last micro-batch of the step."""


def micro_batches(slots: Sequence[SlotRange], micro_size: int) -> tuple[MicroBatch, ...]:
    """The micro-batches of a rank that computes `slots`, each of at most `micro_size` samples, in order.

    >>> [(m.first, m.stop, m.ends_slot, m.last) for m in micro_batches([(0, (0, 3)), (1, (3, 5))], 2)]
    [(0, 2, False, False), (2, 3, True, False), (3, 5, True, True)]
    """
    pieces = [
        (slot, first, min(first + micro_size, hi), first == lo, first + micro_size >= hi)
        for slot, (lo, hi) in slots
        for first in range(lo, hi, micro_size)
    ]
    return tuple(MicroBatch(*piece, last=index == len(pieces) - 1) for index, piece in enumerate(pieces))


@dataclass(frozen=True)
class StepContext:
    """What does not change while the trainer is a member of one generation."""

    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    feed: BatchSource
    reducer: Reducer
    group: Group
    buffers: Buffers
    freezing: Freezing
    sentinel: Sentinel
    stopwatch: Stopwatch
    enter_phase: Callable[[str], None]
    """Called as each phase begins: "forward", "reduce" (before the last backward), "update"."""
    seed: int
    num_slots: int
    """Slots of the global batch, over all ranks."""
    nominal_count: float
    """What the gradient is divided by: the loss terms of a global batch in which no label is ignored."""
    scale: Tensor
    """1 / nominal_count, a 0-d tensor on the device: the gradient of each micro-batch's loss sum."""
    logged: Sequence[str]
    """Names of the further means that each loss brings."""
    uses_non_torch_rng: bool
    """Whether the model or the loss draws from Python's or NumPy's generators too."""
    clip_norm: float | None
    """The largest 2-norm of the whole gradient; None: not clipped."""
    clip_value: float | None
    """The largest absolute value of an entry; None: not clipped."""
    coupling: Coupling | None
    """The first pass of a step, for a task whose loss compares the samples of a batch with each other."""
    forwards_per_slot: Sequence[int]
    """For every slot of the global batch how many micro-batches it has."""


class StepInput(NamedTuple):
    """What one rank brings to one step."""

    step: int
    micro_batches: Sequence[MicroBatch]
    batch_number: int
    """Which batch of the sample order: the step's number, unless the phases of a round share one."""
    votes: Sequence[int] = ()
    """Whole numbers that are added up over the ranks, such as votes for a pause."""
    report: Sequence[float] = ()
    """Numbers of this rank that every rank receives; the first is the step."""
    loss_scale: float = 1.0
    """A further factor on the loss during the backward, a power of two; 1 unless the precision is float16."""


class StepResult(NamedTuple):
    """The outcome of a step, the same on every rank but for `suspects`."""

    loss: float
    """Mean loss over the global batch."""
    gradient_norm: float
    """2-norm before clipping; inf or nan where a gradient isn't finite."""
    committed: bool
    """Whether the update took place: not where loss or gradient are not finite."""
    votes: tuple[int, ...]
    """The sums of the ranks' votes."""
    slot_losses: tuple[float, ...]
    """Loss sum of each slot."""
    logged: Mapping[str, float] = MappingProxyType({})
    """The further means over the global batch, by name; a mean of nothing is left out."""
    reports: tuple[Sequence[float], ...] = ()
    """Each rank's report."""
    suspects: tuple[int, ...] = ()
    """Ranks whose part of the gradient arrived here with entries that are not finite."""
    overflowed: bool = False
    """Whether the update was left out because the gradient of the scaled loss wasn't finite, while the loss is."""


def train_step(context: StepContext, given: StepInput) -> StepResult:
    """Compute this rank's slots, reduce with the other ranks, and update unless something isn't finite.

    Raises PeerLost when a collective can't be finished: the model is then still at the last committed
    step. Raises Diverged when the replicas' hashes differ, before the update. Raises HalfUpdated when
    the update itself fails. Raises TrainingError for a buffer that has begun to change, or a frozen
    parameter that the model has released.
    """
    buffers, reducer = context.buffers, context.reducer
    scale = context.scale if given.loss_scale == 1.0 else context.scale * given.loss_scale
    totals = StepTotals(context.num_slots, buffers, context.group, given.votes, given.report, context.logged)
    buffers.begin_step()
    reducer.begin_step()
    try:
        context.enter_phase("forward")
        if context.coupling is not None:
            begin = partial(_begin_slot, context, given.step)
            context.coupling.first_pass(given.batch_number, given.micro_batches, begin, context.group)
        for micro in given.micro_batches:
            _begin_slot(context, given.step, micro)
            loss = _forward(context, given.batch_number, micro)
            totals.add(micro.slot, loss)
            if micro.ends_slot:
                totals.add_buffers(micro.slot)
            if micro.last:
                totals.start_sum()  # travels while the last backward runs
                context.enter_phase("reduce")
            reducer.backward(loss.total, scale, last=micro.last)
            if micro.ends_slot:
                reducer.end_slot(micro.slot)
        buffers.check_constants(given.step)
        context.freezing.check(given.step)
        context.stopwatch.stop(sum(m.stop - m.first for m in given.micro_batches))
        reduced = totals.wait()
        _check_same_step(reduced, given.step)
        buffers.check_agreement(reduced.buffer_rows, context.forwards_per_slot, given.step)
        reducer.finish_step()
        context.sentinel.compare(context.group)
        context.enter_phase("update")
    except BaseException:
        # The step will run again, in another generation: the buffers that the forward changed go back.
        buffers.restart()
        raise
    return _commit(context, reduced, given.loss_scale)


def _begin_slot(context: StepContext, step: int, micro: MicroBatch) -> None:
    """Where a slot begins: its own random stream, and the buffers as the step found them."""
    if micro.begins_slot:
        seed = stream_seed(context.seed, step, micro.slot)
        begin_stream(seed, context.group.device, context.uses_non_torch_rng)
        context.buffers.begin_slot()


def _forward(context: StepContext, batch_number: int, micro: MicroBatch) -> MicroBatchLoss:
    """The loss sum of a micro-batch, and how many loss terms are in the sum."""
    # A function of its own, so that the batch is let go of before the next forward.
    batch = context.feed.fetch(batch_number, micro.first, micro.stop)
    return context.reducer.forward(batch, range(micro.first, micro.stop), last=micro.last)


def _check_same_step(reduced: ReducedTotals, step: int) -> None:
    """Raise PeerLost where a rank is at another step: memory that fails before an update can make a rank decide alone."""
    steps = [int(report[0]) for report in reduced.reports]
    if any(other != step for other in steps):
        raise PeerLost(f"the ranks are at different steps: {steps}")


def _commit(context: StepContext, reduced: ReducedTotals, loss_scale: float) -> StepResult:
    """The step's last act: every rank holds the same sums, so every rank decides the same. Raises PeerLost, HalfUpdated."""
    count = _counted(reduced.counts)
    gradients = [p.grad for p in context.parameters if p.grad is not None]
    if loss_scale != 1.0:
        torch._foreach_mul_(gradients, 1.0 / loss_scale)
    if count != context.nominal_count:
        torch._foreach_mul_(gradients, context.nominal_count / count)
    norm = gradient_norm(gradients)
    try:
        context.group.synchronize()
    except PeerLost:
        context.buffers.restart()
        raise
    loss = sum(reduced.losses) / count
    committed = math.isfinite(norm) and math.isfinite(loss)
    suspects: tuple[int, ...] = ()
    if committed:
        if context.clip_norm is not None and norm > context.clip_norm:
            torch._foreach_mul_(gradients, context.clip_norm / (norm + 1e-6))
        if context.clip_value is not None:
            torch._foreach_clamp_min_(gradients, -context.clip_value)
            torch._foreach_clamp_max_(gradients, context.clip_value)
        _update(context.optimizer)
        context.buffers.combine(reduced.buffer_rows)
    else:
        context.buffers.restart()
        suspects = context.reducer.nonfinite_ranks()
    reports = tuple(reduced.reports)
    overflowed = not committed and math.isfinite(loss) and loss_scale > 1.0
    return StepResult(
        loss, norm, committed, reduced.votes, tuple(reduced.losses), reduced.logged, reports, suspects, overflowed
    )


def _counted(counts: Sequence[float]) -> float:
    """What the step's loss is divided by. Raises TrainingError for counts that are none."""
    count = sum(counts)
    if not 0.0 <= count < math.inf or min(counts) < 0.0:
        raise TrainingError(
            f"the counts of the step's losses, slot by slot, are {counts}; a count is what a mean divides by, so it must "
            "be 0 or more, and finite"
        )
    return count or 1.0  # nothing to learn from: all labels ignored


def _update(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer update the parameters. Unlike a step that fails before, an update can't simply run again."""
    try:
        optimizer.step()
    except Exception as error:
        raise HalfUpdated(
            f"the optimizer failed in the middle of an update ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}), so this replica's state is lost"
        ) from error


def gradient_norm(gradients: list[Tensor]) -> float:
    """The 2-norm over all entries; not finite if one of them isn't."""
    if not gradients:
        return 0.0
    norms = torch._foreach_norm(gradients)
    if gradients[0].device.type == "cpu":  # reading a few numbers costs less than two more kernels
        return math.sqrt(sum(value * value for value in (n.item() for n in norms)))
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def layer_norms(layers: Sequence[tuple[str, nn.Parameter]]) -> dict[str, float]:
    """Gradient 2-norm of each layer.

    layers: (layer, parameter) for each parameter, in the order in which the layers are to be listed.
    """
    present = [(name, p.grad) for name, p in layers if p.grad is not None]
    if not present:
        return {}
    norms = torch.stack(torch._foreach_norm([gradient for _, gradient in present])).tolist()
    squares: dict[str, float] = {}
    for (name, _), norm in zip(present, norms, strict=True):
        squares[name] = squares.get(name, 0.0) + norm * norm
    return {name: total**0.5 for name, total in squares.items()}
