"""All gradients in one flat buffer, cut into buckets that are handed over as the backward fills them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


class FlatBuckets:
    """The parameters' `.grad` are views on `flat`, in the order in which the backward makes them.

    After `start`, `send(bucket)` is called for each bucket as soon as it is whole, in the
    order of the buckets, so that every rank starts its collectives in one order.
    A bucket's length is a multiple of `pieces`.
    """

    def __init__(self, model: nn.Module, pieces: int, send: Callable[[int], None]) -> None:
        self._send = send
        self._started = False
        self._next = 0
        parameters = [p for p in reversed(list(model.parameters())) if p.requires_grad]
        kinds = {(p.dtype, p.device) for p in parameters}
        assert len(kinds) == 1, "one dtype and device for all trainable parameters"
        self.bounds: list[tuple[int, int]] = []
        """Per bucket its range within `flat`."""
        self.places: list[tuple[nn.Parameter, int, int]] = []
        """(parameter, its offset in `flat`, its bucket)"""
        self._sizes: list[int] = []
        self.flat = self._layout(parameters, pieces, *kinds.pop())
        self._missing = list(self._sizes)
        self._hooks: list[Any] = [p.register_post_accumulate_grad_hook(self._ready(b)) for p, _, b in self.places]

    def _layout(self, parameters: list[nn.Parameter], pieces: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        limit, aligned = BUCKET_BYTES // dtype.itemsize, _ALIGNED_BYTES // dtype.itemsize
        start = end = count = 0
        for index, p in enumerate(parameters):
            self.places.append((p, end, len(self.bounds)))
            end, count = end + p.numel(), count + 1
            end += -end % aligned
            if end - start >= limit or index == len(parameters) - 1:
                end += -(end - start) % math.lcm(pieces, aligned)
                self.bounds.append((start, end))
                self._sizes.append(count)
                start, count = end, 0
        flat = torch.zeros(end, dtype=dtype, device=device)
        for p, offset, _ in self.places:
            p.grad = like(p, flat[offset : offset + p.numel()])
        return flat

    def _ready(self, bucket: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            if self._started:
                self._missing[bucket] -= 1
                while self._next < len(self.bounds) and self._missing[self._next] == 0:
                    self._send(self._next)
                    self._next += 1

        return hook

    def begin(self) -> None:
        """A new step: all zero, nothing is whole."""
        self._missing = list(self._sizes)
        self._next = 0
        self._started = False
        self.flat.zero_()

    def start(self) -> None:
        """What is accumulated from now on is the last of this step."""
        self._started = True

    def flush(self) -> None:
        """Hand over the rest: buckets with parameters that this step didn't use."""
        while self._next < len(self.bounds):
            self._send(self._next)
            self._next += 1

    def close(self) -> None:
        """Take the hooks off the parameters (the next generation brings its own)."""
        for hook in self._hooks:
            hook.remove()
