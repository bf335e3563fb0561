"""All gradients in one flat buffer, cut into buckets that are handed over as the backward fills them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from descent.errors import TrainingError
from descent.optim.memory_layout import is_dense

BUCKET_BYTES = 8 << 20
_ALIGNED_BYTES = 64
"""Each gradient begins at a multiple of this, however many pieces a bucket has: a kernel may read
by vectors, and so add up a norm in another order, where its input's address allows it."""


def like(parameter: nn.Parameter, block: Tensor) -> Tensor:
    """`block`, [numel], as a gradient of `parameter`: laid out in memory as the parameter is, where that is dense.

    That is autograd's own rule for gradients. A fused update pairs the two by their places in memory.
    """
    return block.as_strided(parameter.shape, parameter.stride()) if is_dense(parameter) else block.view_as(parameter)


@dataclass(frozen=True)
class Place:
    """Where one parameter's gradient lies."""

    name: str
    parameter: nn.Parameter
    block: Tensor
    """[numel], a view on the flat buffer."""
    gradient: Tensor
    """The same memory in the parameter's shape and layout."""
    bucket: int
    mark: int
    """Index in the flat buffer of the parameter's mark (see `FlatBuckets`)."""


class FlatBuckets:
    """The parameters' `.grad` are views on `flat`, in the order in which the backward makes them.

    After `start`, `send(bucket)` is called for each bucket as soon as the bucket is whole, in the
    order of the buckets, so that every rank starts its collectives in one order. A bucket's length
    is a multiple of `pieces`.

    A zero in the buffer doesn't tell a gradient of zero from a gradient that nobody computed, which
    torch leaves None and optimizers then leave alone. So each bucket ends with one mark a
    parameter: 0 where this rank's step has used the parameter, 1 where not. The marks are
    reduced with the gradients; a sum equal to the number of ranks means that no rank has used it.
    """

    def __init__(self, model: nn.Module, pieces: int, send: Callable[[int], None]) -> None:
        """pieces: into how many equal parts each bucket can be cut. send: called with a bucket's number."""
        self._send = send
        self._started = False
        self._next = 0
        trained = [(n, p) for n, p in reversed(list(model.named_parameters())) if p.requires_grad]
        kinds = {(p.dtype, p.device) for _, p in trained}
        assert len(kinds) == 1, "one dtype and device for all trainable parameters"
        self.bounds: list[tuple[int, int]] = []
        """Per bucket its range within `flat`, marks included."""
        self.marks: list[tuple[int, int]] = []
        """Per bucket the range of its marks within `flat`."""
        self.places: list[Place] = []
        """One per parameter, in the order of the buffer."""
        self.flat = self._layout(trained, pieces, *kinds.pop())
        self._sizes = [hi - lo for lo, hi in self.marks]
        self._missing = list(self._sizes)
        self._used = bytearray(len(self.places))
        """Per parameter whether this rank has used it in this step."""
        self._arrived = bytearray(len(self.places))
        """Per parameter whether its last gradient of this step has arrived."""
        self._without: list[Place] = []
        """Those whose `.grad` was taken away at the end of the step before."""
        self._hooks: list[RemovableHandle] = [
            place.parameter.register_post_accumulate_grad_hook(self._ready(index, place))
            for index, place in enumerate(self.places)
        ]

    def _layout(
        self, trained: list[tuple[str, nn.Parameter]], pieces: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        limit, aligned = BUCKET_BYTES // dtype.itemsize, _ALIGNED_BYTES // dtype.itemsize
        start = end = 0
        offsets: list[tuple[int, int, int]] = []
        waiting: list[int] = []
        for index, (_, p) in enumerate(trained):
            waiting.append(end)
            end += p.numel()
            end += -end % aligned
            if end - start >= limit or index == len(trained) - 1:
                bucket = len(self.bounds)
                offsets += [(offset, bucket, end + i) for i, offset in enumerate(waiting)]
                self.marks.append((end, end + len(waiting)))
                end += len(waiting)
                end += -(end - start) % math.lcm(pieces, aligned)
                self.bounds.append((start, end))
                start, waiting = end, []
        flat = torch.zeros(end, dtype=dtype, device=device)
        for (name, p), (offset, bucket, mark) in zip(trained, offsets, strict=True):
            block = flat[offset : offset + p.numel()]
            p.grad = like(p, block)
            self.places.append(Place(name, p, block, p.grad, bucket, mark))
        return flat

    def _ready(self, index: int, place: Place) -> Callable[[Tensor], None]:
        bucket = place.bucket

        def hook(_: Tensor) -> None:
            self._used[index] = 1
            if self._started:
                if self._arrived[index]:
                    raise TrainingError(
                        f"model: the gradient of {place.name!r} arrives twice in one backward, so it can't be sent off "
                        "when it first arrives; with torch.utils.checkpoint pass use_reentrant=False"
                    )
                self._arrived[index] = 1
                self._missing[bucket] -= 1
                while self._next < len(self.bounds) and self._missing[self._next] == 0:
                    self._send(self._next)
                    self._next += 1

        return hook

    def begin_step(self) -> None:
        """All gradients zero, no parameter used, no bucket whole."""
        for place in self._without:
            place.parameter.grad = place.gradient
        self._without = []
        self._used[:] = bytes(len(self._used))
        self._arrived[:] = bytes(len(self._arrived))
        self._missing = list(self._sizes)
        self._next = 0
        self._started = False
        self.flat.zero_()

    def start(self) -> None:
        """The gradients that arrive from now on are the last of this step."""
        self._started = True

    def flush(self) -> None:
        """Send the rest: buckets with parameters that the last backward has not reached."""
        while self._next < len(self.bounds):
            lo, hi = self.marks[self._next]
            first = sum(self._sizes[: self._next])
            used = self._used[first : first + hi - lo]
            if 0 in used:
                self.flat[lo:hi].copy_(torch.tensor([1 - u for u in used]))
            self._send(self._next)
            self._next += 1

    def take_from_unused(self, num_ranks: int) -> list[Place]:
        """After the reduction: `.grad` becomes None for parameters that no rank has used; returns their places.

        A rank that has used every parameter itself knows enough and looks at no mark.
        """
        if 0 not in self._used:
            return []
        candidates = [place for place, used in zip(self.places, self._used, strict=True) if not used]
        if num_ranks > 1:
            marks = self.flat[[place.mark for place in candidates]].tolist()
            candidates = [place for place, mark in zip(candidates, marks, strict=True) if mark == num_ranks]
        for place in candidates:
            place.parameter.grad = None
        self._without = candidates
        return candidates

    def close(self) -> None:
        """Take the hooks off the parameters (the next generation brings its own)."""
        for hook in self._hooks:
            hook.remove()
