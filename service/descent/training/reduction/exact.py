"""Reduction along one fixed tree: equal bits for any number of ranks, whichever rank computes which slots."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from descent.data.batch import Batch
from descent.training.collectives import Group, Work
from descent.training.reduction.buckets import FlatBuckets
from descent.training.reduction.losses import LossOf
from descent.training.reduction.tree import Node, combine, tree_nodes
from descent.training.results import MicroBatchLoss


class Exact:
    """The fixed tree over slot numbers, bucket by bucket while the backward still runs. See `Reducer` for the methods.

    A rank adds its own slots' gradients up as far as the tree lets it: to the sums of the fewest nodes
    that cover its slots. During the step's last backward each bucket is sent off as soon as it is whole:
    rank r receives all ranks' sums of the bucket's r-th piece, finishes the tree there, and the
    pieces are gathered.
    """

    def __init__(
        self, model: nn.Module, loss: LossOf, group: Group, shares: Sequence[tuple[int, int]], slots: int
    ) -> None:
        self._loss = loss
        self._group = group
        self._slots = slots
        self._buckets = FlatBuckets(model, group.world_size, self._send)
        self._flat = self._buckets.flat
        self._stack: dict[Node, Tensor] = {}
        """Sums of nodes that are done, or that wait for their sibling."""
        self._spare: list[Tensor] = []
        """Buffers of earlier sums, to be used again."""
        self._works: list[tuple[Work | None, Tensor] | None] = []
        """Per bucket the collective under way and what it brings."""
        self.assign_slots(shares)

    def assign_slots(self, shares: Sequence[tuple[int, int]]) -> None:
        self._nodes = [tree_nodes(lo, hi, self._slots) for lo, hi in shares]
        self._mine = self._nodes[self._group.rank]
        self._last_node = self._mine[-1]
        self._last_slot = shares[self._group.rank][1] - 1

    def begin_step(self) -> None:
        self._release()
        self._works = [None] * len(self._buckets.bounds)
        self._buckets.begin_step()

    def forward(self, batch: Batch, samples: range, *, last: bool) -> MicroBatchLoss:  # noqa: ARG002
        return self._loss(batch, samples)

    def backward(self, loss: Tensor, scale: Tensor, *, last: bool) -> None:
        if last and self._group.world_size > 1:
            self._buckets.start()
        loss.backward(scale.to(loss.dtype))

    def end_slot(self, slot: int) -> None:
        if slot == self._last_slot:
            return  # the last slot's gradient stays in the flat buffer; `_close` adds the others to it
        self._push((slot, 1), self._flat)
        self._flat.zero_()

    def _push(self, leaf: Node, gradient: Tensor) -> None:
        """Put a slot's gradient into the tree, and merge every pair of siblings that is complete."""
        node, merged = leaf, None
        while node not in self._mine:
            first, size = node
            if first % (2 * size) == 0:  # a left child: waits for its sibling
                break
            sibling = self._stack.pop((first - size, size))
            self._recycle(merged)
            merged = sibling.add_(gradient if merged is None else merged)
            node = (first - size, 2 * size)
        if merged is None:
            merged = self._spare.pop() if self._spare else torch.empty_like(self._flat)
            merged.copy_(gradient)
        self._stack[node] = merged

    def _recycle(self, buffer: Tensor | None) -> None:
        if buffer is not None:
            self._spare.append(buffer)

    def _close(self, lo: int, hi: int) -> None:
        """Merge the last slot's gradient, in lo … hi-1, with the siblings that wait for it."""
        first, size = self._last_slot, 1
        while (first, size) != self._last_node:
            if first % (2 * size) != 0:
                sibling = self._stack[(first - size, size)][lo:hi]
                # left + right, into the flat buffer: addition commutes bit for bit
                self._flat[lo:hi].add_(sibling)
                first -= size
            size *= 2

    def _partial(self, node: Node, lo: int, hi: int) -> Tensor:
        """This rank's sum of a node, entries lo … hi-1."""
        return self._flat[lo:hi] if node == self._last_node else self._stack[node][lo:hi]

    def _send(self, bucket: int) -> None:
        """Start the exchange of a bucket's partial sums."""
        lo, hi = self._buckets.bounds[bucket]
        self._close(lo, hi)
        world = self._group.world_size
        if world == 2 and all(len(nodes) == 1 for nodes in self._nodes):
            # Two operands: any all-reduce is the tree.
            self._works[bucket] = (self._group.sum_async(self._flat[lo:hi]), self._flat[lo:hi])
            return
        piece = (hi - lo) // world
        if len(self._mine) == 1:
            send = self._flat[lo:hi]
        else:
            stacked = torch.stack([self._partial(node, lo, hi) for node in self._mine])
            send = stacked.view(len(self._mine), world, piece).transpose(0, 1).reshape(-1)
        received = self._flat.new_empty(piece * sum(map(len, self._nodes)))
        work = self._group.exchange_async(
            received,
            send,
            [piece * len(nodes) for nodes in self._nodes],
            [piece * len(self._mine)] * world,
        )
        self._works[bucket] = (work, received)

    def finish_step(self) -> None:
        if self._group.world_size == 1:
            lo, hi = 0, self._flat.numel()
            self._close(lo, hi)
            partials = {node: self._partial(node, lo, hi) for node in self._mine}
            total = combine(partials, self._slots)
            if total.data_ptr() != self._flat.data_ptr():
                self._flat.copy_(total)
            self._buckets.take_from_unused(1)
            self._release()
            return
        self._buckets.flush()
        gathers = []
        for bucket, entry in enumerate(self._works):
            assert entry is not None
            work, received = entry
            self._group.wait(work)
            lo, hi = self._buckets.bounds[bucket]
            if self._in_place(bucket, received):
                continue
            nodes = [node for held in self._nodes for node in held]
            total = combine(dict(zip(nodes, received.chunk(len(nodes)), strict=True)), self._slots)
            gathers.append((self._group.gather_async(self._flat[lo:hi], total), total))
        for work, _ in gathers:
            self._group.wait(work)
        self._buckets.take_from_unused(self._group.world_size)
        self._release()

    def _in_place(self, bucket: int, received: Tensor) -> bool:
        """Whether a bucket was summed where it lies, by an all-reduce of two operands."""
        return received.data_ptr() == self._flat[self._buckets.bounds[bucket][0] :].data_ptr()

    def nonfinite_ranks(self) -> tuple[int, ...]:
        """The ranks whose partial sums, as received here, weren't finite.

        The tree adds from right to left into what was received, so only a piece with
        nothing but finite ones to its right is surely not finite by itself.
        """
        if self._group.world_size == 1:
            return (0,)
        owners = [rank for rank, held in enumerate(self._nodes) for _ in held]
        found = set()
        for bucket, entry in enumerate(self._works):
            if entry is None or self._in_place(bucket, entry[1]):
                continue
            partials = zip(owners, entry[1].chunk(len(owners)), strict=True)
            dirty = [owner for owner, partial in partials if not partial.isfinite().all()]
            found.update(dirty[-1:])
        return tuple(sorted(found))

    def _release(self) -> None:
        self._spare.extend(self._stack.values())
        self._stack.clear()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        self._buckets.close()
