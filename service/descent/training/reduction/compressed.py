"""The fast reduction with fewer bytes on the wire: bf16, or low-rank matrices (PowerSGD).

DDP's communication hooks are not used: Python code that gloo's thread has to call deadlocks when a
group is abandoned. Instead the buckets of `FlatBuckets` are compressed and sent as the backward
fills them, and unpacked when all have arrived.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from descent.data.batch import Batch
from descent.optim.memory_layout import is_dense
from descent.training.collectives import Group, Work
from descent.training.reduction.buckets import FlatBuckets, Place
from descent.training.reduction.losses import LossOf
from descent.training.results import MicroBatchLoss

RANK = 4
"""Of the matrices that PowerSGD sends; its paper takes 2 for a ResNet and 4 for a language model."""
_WORTH = 2.0
"""A matrix is compressed where that makes it at least this many times smaller."""


class _Codec(Protocol):
    """How the buckets of one generation travel."""

    def send(self, bucket: int) -> None:
        """Start the first collective of a bucket, which holds this rank's gradients."""
        ...

    def finish_step(self) -> None:
        """Put the sums over the ranks into the buckets."""
        ...

    def forget_sent(self, unused: Sequence[Place]) -> None:
        """These parameters were used by no rank: what was sent for them is not applied."""
        ...

    def nonfinite_ranks(self) -> tuple[int, ...]:
        """As in `Reducer`; memory of earlier steps is put right for a step that was not committed."""
        ...


class Compressed:
    """DDP's mathematics with fewer bytes on the wire. See `Reducer` for the methods.

    Gradients add up over a rank's slots; during the step's last backward each whole bucket is sent off.
    """

    def __init__(self, model: nn.Module, loss: LossOf, group: Group, kind: str) -> None:
        """kind: "bf16" or "powersgd"."""
        self._loss, self._group = loss, group
        self._buckets = FlatBuckets(model, group.world_size, lambda bucket: codec.send(bucket))
        codec: _Codec = (_Bf16 if kind == "bf16" else _PowerSGD)(group, self._buckets)
        self._codec = codec

    def begin_step(self) -> None:
        self._buckets.begin_step()

    def forward(self, batch: Batch, samples: range, *, last: bool) -> MicroBatchLoss:  # noqa: ARG002
        return self._loss(batch, samples)

    def backward(self, loss: Tensor, scale: Tensor, *, last: bool) -> None:
        if last:
            self._buckets.start()
        loss.backward(scale.to(loss.dtype))

    def end_slot(self, slot: int) -> None:
        pass

    def finish_step(self) -> None:
        self._buckets.flush()
        self._codec.finish_step()
        unused = self._buckets.take_from_unused(self._group.world_size)
        if unused:
            self._codec.forget_sent(unused)

    def nonfinite_ranks(self) -> tuple[int, ...]:
        return self._codec.nonfinite_ranks()

    def assign_slots(self, shares: Sequence[tuple[int, int]]) -> None:
        pass

    def close(self) -> None:
        """Take the hooks off the parameters."""
        self._buckets.close()


class _Bf16:
    """Half the bytes: each sender rounds once, the sum is computed in float32 and rounded once.

    Rank r adds up all ranks' r-th pieces of a bucket, and the pieces are gathered.
    """

    def __init__(self, group: Group, buckets: FlatBuckets) -> None:
        self._group, self._buckets = group, buckets
        self._arriving: list[tuple[Work, Tensor, Tensor]] = []

    def send(self, bucket: int) -> None:
        lo, hi = self._buckets.bounds[bucket]
        if bucket == 0:
            self._arriving = []
        send = self._buckets.flat[lo:hi].bfloat16()
        received = torch.empty_like(send)
        sizes = [2 * (hi - lo) // self._group.world_size] * self._group.world_size
        # As bytes: gloo has no 16-bit floating-point numbers, and an exchange computes nothing.
        work = self._group.exchange_async(_bytes(received), _bytes(send), sizes, sizes)
        self._arriving.append((work, received, send))

    def finish_step(self) -> None:
        gathers = []
        for (lo, hi), (work, received, _) in zip(self._buckets.bounds, self._arriving, strict=True):
            self._group.wait(work)
            total = received.view(self._group.world_size, -1).float().sum(0).bfloat16()
            whole = received.new_empty(hi - lo)
            work = self._group.gather_async(_bytes(whole), _bytes(total))
            gathers.append((work, whole, total))
        for (lo, hi), (work, whole, _) in zip(self._buckets.bounds, gathers, strict=True):
            self._group.wait(work)
            self._buckets.flat[lo:hi].copy_(whole)

    def forget_sent(self, unused: Sequence[Place]) -> None:
        pass  # no memory of what was sent

    def nonfinite_ranks(self) -> tuple[int, ...]:
        world = self._group.world_size
        return tuple(
            rank
            for rank in range(world)
            if any(not received.view(world, -1)[rank].isfinite().all() for _, received, _ in self._arriving)
        )


@dataclass
class _Matrix:
    """A parameter's gradient as a matrix, and the two thin factors that are sent in its place."""

    gradient: Tensor
    """[n, m], a view on the flat buffer; later the sum over the ranks."""
    error: Tensor
    """[n, m]: the part of this rank's gradients that its earlier messages left out."""
    q: Tensor
    """[m, rank]: the last step's right factor, with which this step's iteration begins; the same on all ranks."""
    p: Tensor
    """[n, rank]: its left factor, orthonormal columns."""
    own: Tensor
    """[m, rank]: this rank's part of the right factor."""


class _PowerSGD:
    """PowerSGD: matrices travel as two thin factors (Vogels et al., arXiv:1905.13727, algorithms 1 and 2).

    For M = the sum over ranks of M_r = gradient + error, one step of subspace iteration from
    the last step's Q: P = orthonormalize(sum of M_r Q), Q = sum of M_rᵀ P, and P Qᵀ is
    taken for M. What this rank's part lost, M_r - P (M_rᵀ P)ᵀ, is its next error. Vectors
    and small matrices travel whole. The first Q is drawn from a seed, alike on all ranks.

    Errors are this rank's alone and not part of the training's state: a new generation,
    and a step that wasn't committed, begin without.
    """

    def __init__(self, group: Group, buckets: FlatBuckets) -> None:
        self._group, self._buckets = group, buckets
        self._matrices: list[list[_Matrix]] = [[] for _ in buckets.bounds]
        self._whole: list[list[Tensor]] = [[] for _ in buckets.bounds]
        generator = torch.Generator().manual_seed(0)
        self._by_name: dict[str, _Matrix] = {}
        for (lo, hi), whole in zip(buckets.marks, self._whole, strict=True):
            whole.append(buckets.flat[lo:hi])
        for place in buckets.places:
            block, bucket = place.block, place.bucket
            gradient = as_matrix(place.parameter, block)
            rows, columns = gradient.shape
            rank = min(RANK, rows, columns)
            if rows == 1 or rank * (rows + columns) * _WORTH > block.numel():
                self._whole[bucket].append(block)
                continue
            q = torch.randn(columns, rank, generator=generator).to(block)
            matrix = _Matrix(gradient, torch.zeros_like(gradient), q, block.new_empty(rows, rank), torch.empty_like(q))
            self._matrices[bucket].append(matrix)
            self._by_name[place.name] = matrix
        self._arriving: list[tuple[Work | None, Tensor]] = []

    def send(self, bucket: int) -> None:
        """First round: send small tensors whole, and M_r Q of each matrix."""
        if bucket == 0:
            self._arriving = []
        for m in self._matrices[bucket]:
            m.gradient += m.error
            torch.mm(m.gradient, m.q, out=m.p)
        message = _packed([*self._whole[bucket], *(m.p for m in self._matrices[bucket])])
        self._arriving.append((self._group.sum_async(message), message))

    def finish_step(self) -> None:
        """Second round: send M_rᵀ P; then unpack everything."""
        second = []
        for bucket, (work, message) in enumerate(self._arriving):
            self._group.wait(work)
            matrices = self._matrices[bucket]
            _unpack(message, [*self._whole[bucket], *(m.p for m in matrices)])
            for m in matrices:
                m.p.copy_(torch.linalg.qr(m.p).Q)
                torch.mm(m.gradient.T, m.p, out=m.own)
            answer = _packed([m.own for m in matrices]) if matrices else message[:0]
            second.append((self._group.sum_async(answer) if matrices else None, answer))
        for (work, answer), matrices in zip(second, self._matrices, strict=True):
            self._group.wait(work)
            _unpack(answer, [m.q for m in matrices])
            for m in matrices:
                torch.addmm(m.gradient, m.p, m.own.T, alpha=-1.0, out=m.error)
                torch.mm(m.p, m.q.T, out=m.gradient)

    def forget_sent(self, unused: Sequence[Place]) -> None:
        for place in unused:
            if place.name in self._by_name:
                m = self._by_name[place.name]
                m.error.addmm_(m.p, m.own.T)  # this rank's part of what was sent is still to be sent

    def nonfinite_ranks(self) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(0)
        for matrices in self._matrices:
            for m in matrices:
                m.error.zero_()
                m.q.copy_(torch.randn(m.q.shape, generator=generator))
        return ()  # the messages are summed on their way


def as_matrix(parameter: nn.Parameter, block: Tensor) -> Tensor:
    """`block`, [numel], laid out in memory as `parameter` is, as the matrix [rows, columns] that is factored; a view.

    The rows are the parameter's first dimension; the columns are the others, in the order in which they lie in
    memory. Where the first dimension lies between others, the rows are the outermost dimension in memory.
    """
    if parameter.dim() < 2:
        return block.view(1, -1)
    rows = parameter.shape[0]
    if not is_dense(parameter):  # such a gradient is row-major
        return block.view(rows, -1)
    order = sorted((d for d in range(parameter.dim()) if parameter.shape[d] > 1), key=lambda d: -parameter.stride()[d])
    if rows == 1 or order[0] == 0:
        return block.view(rows, -1)
    return block.view(-1, rows).T if order[-1] == 0 else block.view(parameter.shape[order[0]], -1)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _unpack(message: Tensor, tensors: Sequence[Tensor]) -> None:
    sizes = [t.numel() for t in tensors]
    for tensor, piece in zip(tensors, message[: sum(sizes)].split(sizes), strict=True):
        tensor.copy_(piece.view_as(tensor))
