"""How the slots' gradients become one gradient: three reducers behind one interface.

`Solo` for one replica of one slot range where bits across sizes don't matter, `Fast`
on DDP's overlapped reducer, `Exact` on one fixed pairwise tree over slot numbers.
All leave the *sum* over the global batch, times `scale`, in `p.grad`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from service.training.collectives import Group, PeerLost, is_lost_peer

_BUCKET_BYTES = 8 << 20


class Reducer(Protocol):
    """One step: `begin`, then per slot some `backward`s and `end_slot`, then `finish`."""

    @property
    def forward(self) -> Callable[..., Tensor]: ...
    def begin(self) -> None: ...
    def backward(
        self, loss: Callable[[], Tensor], scale: Tensor, last: bool, before: Callable[[], None]
    ) -> None: ...
    def end_slot(self, slot: int, last: bool) -> None: ...
    def finish(self) -> None: ...


class Solo:
    """One replica: autograd's own accumulation is the whole reduction."""

    def __init__(self, model: nn.Module) -> None:
        self.forward = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def begin(self) -> None:
        for p in self._parameters:
            p.grad = None

    def backward(
        self, loss: Callable[[], Tensor], scale: Tensor, last: bool, before: Callable[[], None]
    ) -> None:
        value = loss()
        if last:
            before()
        value.backward(scale.to(value.dtype))

    def end_slot(self, slot: int, last: bool) -> None:
        pass

    def finish(self) -> None:
        pass


class Fast:
    """torch's DDP: buckets travel while the backward still runs."""

    def __init__(self, model: nn.Module, group: Group, find_unused: bool) -> None:
        self._ddp = group.data_parallel(model, find_unused)
        self._world_size = group.world_size
        self.forward = self._ddp
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def begin(self) -> None:
        for p in self._parameters:
            p.grad = None

    def backward(
        self, loss: Callable[[], Tensor], scale: Tensor, last: bool, before: Callable[[], None]
    ) -> None:
        # Only the step's last backward talks to the others; earlier micro-batches just add up.
        with contextlib.nullcontext() if last else self._ddp.no_sync():
            value = loss() * self._world_size  # the reducer averages, we want the sum
            if last:
                before()
            try:
                value.backward(scale.to(value.dtype))
            except RuntimeError as error:
                if is_lost_peer(error):
                    raise PeerLost(str(error).splitlines()[0]) from error
                raise

    def end_slot(self, slot: int, last: bool) -> None:
        pass

    def finish(self) -> None:
        pass


Node = tuple[int, int]
"""A node of the tree over slots: (first slot, number of slots under it when the tree is full)."""


def tree_nodes(lo: int, hi: int, slots: int) -> list[Node]:
    """The fewest nodes of the fixed tree that cover the slots lo … hi-1, from left to right.

    The tree is that of the next power of two; leaves beyond `slots` don't exist.

    >>> tree_nodes(0, 3, 4), tree_nodes(2, 3, 3)
    ([(0, 2), (2, 1)], [(2, 2)])
    """
    nodes: list[Node] = []
    while lo < hi:
        size = 1
        while lo % (2 * size) == 0 and min(lo + 2 * size, slots) <= hi and lo + size < slots:
            size *= 2
        # A last leaf without siblings to its right stands for every node above that holds it alone.
        while lo + size >= slots and lo % (2 * size) == 0 and lo > 0 and 2 * size <= lo:
            size *= 2
        nodes.append((lo, size))
        lo = min(lo + size, slots)
    return nodes


def combine(partials: dict[Node, Tensor], slots: int) -> Tensor:
    """The root of the tree from the sums of nodes that cover all slots; partials are consumed.

    Each inner node is left + right, whoever computed them, so the result's bits depend on
    the slots' gradients alone.
    """
    top = 1
    while top < slots:
        top *= 2

    def value(first: int, size: int) -> Tensor | None:
        if first >= slots:
            return None
        if (first, size) in partials:
            return partials[(first, size)]
        assert size > 1, f"no partial sum covers slot {first}"
        left, right = value(first, size // 2), value(first + size // 2, size // 2)
        assert left is not None
        return left if right is None else left.add_(right)

    result = value(0, top)
    assert result is not None
    return result


class Exact:
    """The fixed tree: equal bits for any number of ranks that share the slots.

    Gradients live in one flat buffer (the parameters' `.grad` are views on it), in the
    order in which the backward makes them, cut into buckets. During a step's last
    backward each bucket is sent off as soon as it is whole: rank r receives everyone's
    partial sums of the bucket's r-th piece, finishes the tree there, and the pieces are
    gathered. Collectives start in the order of buckets on every rank.
    """

    def __init__(
        self, model: nn.Module, group: Group, shares: Sequence[tuple[int, int]], slots: int
    ) -> None:
        self.forward = model
        self._group = group
        self._slots = slots
        self._nodes = [tree_nodes(lo, hi, slots) for lo, hi in shares]
        self._mine = self._nodes[group.rank]
        self._last_node = self._mine[-1]
        parameters = [p for p in reversed(list(model.parameters())) if p.requires_grad]
        kinds = {(p.dtype, p.device) for p in parameters}
        assert len(kinds) == 1, "one dtype and device for all trainable parameters"
        self._layout(parameters, *kinds.pop())
        self._stack: dict[Node, Tensor] = {}
        self._spare: list[Tensor] = []
        self._sending = False
        self._works: list[tuple[Any, Tensor] | None] = []
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._ready(b)) for p, b in self._bucket_of
        ]

    def _layout(
        self, parameters: list[nn.Parameter], dtype: torch.dtype, device: torch.device
    ) -> None:
        world = self._group.world_size
        limit = _BUCKET_BYTES // dtype.itemsize
        self._bounds: list[tuple[int, int]] = []
        self._bucket_of: list[tuple[nn.Parameter, int]] = []
        self._sizes: list[int] = []
        places: list[tuple[nn.Parameter, int]] = []
        start = end = count = 0
        for index, p in enumerate(parameters):
            places.append((p, end))
            self._bucket_of.append((p, len(self._bounds)))
            end, count = end + p.numel(), count + 1
            if end - start >= limit or index == len(parameters) - 1:
                end += -(end - start) % world  # pieces of equal length
                self._bounds.append((start, end))
                self._sizes.append(count)
                start, count = end, 0
        self._flat = torch.zeros(end, dtype=dtype, device=device)
        for p, offset in places:
            p.grad = self._flat[offset : offset + p.numel()].view_as(p)

    def _ready(self, bucket: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if self._sending:
                self._missing[bucket] -= 1
                while self._next < len(self._bounds) and self._missing[self._next] == 0:
                    self._send(self._next)
                    self._next += 1

        return hook

    def begin(self) -> None:
        self._stack.clear()
        self._works = [None] * len(self._bounds)
        self._missing = list(self._sizes)
        self._next = 0
        self._sending = False
        self._flat.zero_()

    def backward(
        self, loss: Callable[[], Tensor], scale: Tensor, last: bool, before: Callable[[], None]
    ) -> None:
        value = loss()
        if last:
            before()
            self._sending = self._group.world_size > 1
        value.backward(scale.to(value.dtype))

    def end_slot(self, slot: int, last: bool) -> None:
        """Put a finished slot's gradient into the tree and make room for the next."""
        if last:
            return
        self._push((slot, 1), self._flat)
        self._flat.zero_()

    def _push(self, leaf: Node, gradient: Tensor) -> None:
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
        first, size = self._last_slot_leaf()
        while (first, size) != self._last_node:
            if first % (2 * size) != 0:
                sibling = self._stack[(first - size, size)][lo:hi]
                # left + right, into the flat buffer: addition commutes bit for bit
                self._flat[lo:hi].add_(sibling)
                first -= size
            size *= 2

    def _last_slot_leaf(self) -> Node:
        first, size = self._last_node
        return (min(first + size, self._slots) - 1, 1)

    def _partial(self, node: Node, lo: int, hi: int) -> Tensor:
        return self._flat[lo:hi] if node == self._last_node else self._stack[node][lo:hi]

    def _send(self, bucket: int) -> None:
        lo, hi = self._bounds[bucket]
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

    def finish(self) -> None:
        """Finish the tree piece by piece and gather; afterwards `.grad` holds the sum."""
        if self._group.world_size == 1:
            lo, hi = 0, self._flat.numel()
            self._close(lo, hi)
            partials = {node: self._partial(node, lo, hi) for node in self._mine}
            total = combine(partials, self._slots)
            if total.data_ptr() != self._flat.data_ptr():
                self._flat.copy_(total)
            self._release()
            return
        while self._next < len(self._bounds):  # parameters that this step didn't use
            self._send(self._next)
            self._next += 1
        gathers = []
        for bucket, entry in enumerate(self._works):
            assert entry is not None
            work, received = entry
            self._group.wait(work)
            lo, hi = self._bounds[bucket]
            if received.data_ptr() == self._flat[lo:hi].data_ptr():
                continue
            nodes = [node for held in self._nodes for node in held]
            total = combine(dict(zip(nodes, received.chunk(len(nodes)), strict=True)), self._slots)
            gathers.append((self._group.gather_async(self._flat[lo:hi], total), total))
        for work, _ in gathers:
            self._group.wait(work)
        self._release()

    def _release(self) -> None:
        self._spare.extend(self._stack.values())
        self._stack.clear()

    def close(self) -> None:
        """Take the hooks off the parameters (the next generation brings its own)."""
        for hook in self._hooks:
            hook.remove()


@contextlib.contextmanager
def reducer_for(
    model: nn.Module,
    group: Group,
    *,
    kind: str,
    shares: Sequence[tuple[int, int]],
    slots: int,
    find_unused: bool,
) -> Iterator[Reducer]:
    """The reducer for one generation; its hooks are gone when the generation ends."""
    if group.world_size == 1 and (slots == 1 or kind == "fast"):
        yield Solo(model)
    elif kind == "fast":
        yield Fast(model, group, find_unused)
    else:
        exact = Exact(model, group, shares, slots)
        try:
            yield exact
        finally:
            exact.close()
