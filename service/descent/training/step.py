"""One optimizer step: slots and their micro-batches, the reduction, clipping, the update.

The step commits on all replicas or on none: everything that can fail happens before
the update, and what decides about it (losses, votes) travels to every rank in one
small vector beside the gradients.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from descent.errors import TrainingError
from descent.training.buffers import Buffers
from descent.training.collectives import Group, PeerLost
from descent.training.determinism import begin_stream
from descent.training.input.sampling import stream_seed
from descent.training.objective import Objective
from descent.training.reduction import Reducer
from descent.training.step_totals import ReducedTotals, StepTotals
from descent.training.stopwatch import Stopwatch


class HalfUpdated(TrainingError):
    """The optimizer's update failed in the middle: this replica must receive the state anew."""


Fetch = Callable[[int, int], tuple[Tensor, Tensor]]
"""(first, stop) within the step's global batch -> inputs [n, …], targets [n, …] on the device."""


class StepInput(NamedTuple):
    """What one rank computes in one step."""

    step: int
    seed: int
    slots: Sequence[tuple[int, tuple[int, int]]]
    """(slot, its range within the global batch) for the slots of this rank."""
    num_slots: int
    micro_size: int
    nominal: float
    """What the gradient is divided by: the expected number of loss terms in the global batch."""
    scale: Tensor
    """1 / nominal, a 0-d tensor on the device: where the backward starts."""
    votes: Sequence[int] = ()
    own: Sequence[float] = ()
    """What this rank has to say of itself; the first is the step."""

    def micro_batches(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """A slot's ranges, in order."""
        return [(start, min(start + self.micro_size, hi)) for start in range(lo, hi, self.micro_size)]


class StepResult(NamedTuple):
    """The same on every rank, but for `suspects`."""

    loss: float
    """Mean loss over the global batch."""
    gradient_norm: float
    """Before clipping; inf or nan where a gradient isn't finite."""
    committed: bool
    """Whether the update took place: not where loss or gradient are not finite."""
    votes: tuple[int, ...]
    slot_losses: tuple[float, ...]
    by_rank: tuple[Sequence[float], ...] = ()
    """`own` of each rank."""
    suspects: tuple[int, ...] = ()
    """Ranks whose part of the gradient was seen here to be not finite."""


def train_step(
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    reducer: Reducer,
    group: Group,
    buffers: Buffers,
    fetch: Fetch,
    given: StepInput,
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    uses_non_torch_rng: bool,
    clip_norm: float | None,
    clip_value: float | None,
    watch: Stopwatch,
    compare: Callable[[], None],
    enter: Callable[[str], None] = lambda _: None,
) -> StepResult:
    """Compute this rank's slots, reduce with the others, and update unless something isn't finite.

    `compare` is called once the gradient is there, before the update, and may refuse it by
    raising. `enter` is told the phases: forward, reduce (the side vector is sent, the last
    backward begins), update.

    Raises PeerLost when a collective can't be finished; the model is then still at the
    last committed step. Raises HalfUpdated where it is not. Raises TrainingError for a
    buffer that has begun to change.
    """
    side = StepTotals(given.num_slots, buffers, group, given.votes, given.own)
    buffers.begin()
    reducer.begin()
    try:
        enter("forward")
        for index, (slot, (lo, hi)) in enumerate(given.slots):
            last_slot = index == len(given.slots) - 1
            begin_stream(stream_seed(given.seed, given.step, slot), group.device, uses_non_torch_rng)
            if index:
                buffers.restart()
            for start, stop in given.micro_batches(lo, hi):
                last = last_slot and stop == hi
                inputs, targets = fetch(start, stop)

                def loss(inputs: Tensor = inputs, targets: Tensor = targets, slot: int = slot) -> Tensor:
                    with autocast():
                        output = reducer.forward(inputs)
                    value = objective(output, targets)
                    side.add(slot, value, objective.count(targets))
                    if not reducer.backward_is_local:
                        watch.stop(len(targets))
                    return value

                def send(slot: int = slot) -> None:
                    side.end_slot(slot)
                    side.send()
                    enter("reduce")

                reducer.backward(loss, given.scale, last, send)
                if not reducer.backward_is_local and not last:
                    watch.start()
            if not last_slot:
                side.end_slot(slot)
            reducer.end_slot(slot, last_slot)
        buffers.check(given.step)
        if reducer.backward_is_local:
            watch.stop(sum(hi - lo for _, (lo, hi) in given.slots))
        sums = side.receive()
        if any(said[0] != given.step for said in sums.by_rank):
            # Memory that fails between the reduction and the update can make a rank decide alone.
            raise PeerLost(f"the ranks are at different steps: {[int(s[0]) for s in sums.by_rank]}")
        reducer.finish()
        compare()
        enter("update")
    except BaseException:
        # The step will run again, in another generation: what the forward moved goes back.
        buffers.restart()
        raise
    return _commit(parameters, optimizer, reducer, group, buffers, sums, given, clip_norm, clip_value)


def _commit(
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    reducer: Reducer,
    group: Group,
    buffers: Buffers,
    sums: ReducedTotals,
    given: StepInput,
    clip_norm: float | None,
    clip_value: float | None,
) -> StepResult:
    """The step's last act: everyone holds the same sums, so everyone decides the same. Raises PeerLost."""
    count = sum(sums.counts) or 1.0  # nothing to learn from: all labels ignored
    gradients = [p.grad for p in parameters if p.grad is not None]
    if count != given.nominal:
        torch._foreach_mul_(gradients, given.nominal / count)
    norm = gradient_norm(gradients)
    try:
        group.synchronize()
    except PeerLost:
        buffers.restart()
        raise
    loss = sum(sums.losses) / count
    committed = norm < float("inf") and loss - loss == 0.0
    suspects: tuple[int, ...] = ()
    if committed:
        if clip_norm is not None and norm > clip_norm:
            torch._foreach_mul_(gradients, clip_norm / (norm + 1e-6))
        if clip_value is not None:
            torch._foreach_clamp_min_(gradients, -clip_value)
            torch._foreach_clamp_max_(gradients, clip_value)
        _update(optimizer)
        if buffers.size:
            buffers.unpack(sums.rows)
    else:
        buffers.restart()
        suspects = reducer.nonfinite_ranks()
    return StepResult(loss, norm, committed, sums.votes, tuple(sums.losses), tuple(sums.by_rank), suspects)


def _update(optimizer: torch.optim.Optimizer) -> None:
    """The update itself. Unlike a step that fails before, it can't simply run again."""
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
        return math.sqrt(sum(n.item() ** 2 for n in norms))
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def layer_norms(layers: Sequence[tuple[str, nn.Parameter]]) -> dict[str, float]:
    """Gradient 2-norm per layer, of parameters with their layers' names, in their order."""
    there = [(name, p.grad) for name, p in layers if p.grad is not None]
    if not there:
        return {}
    norms = torch.stack(torch._foreach_norm([gradient for _, gradient in there])).tolist()
    squares: dict[str, float] = {}
    for (name, _), norm in zip(there, norms, strict=True):
        squares[name] = squares.get(name, 0.0) + norm * norm
    return {name: total**0.5 for name, total in squares.items()}
