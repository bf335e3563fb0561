"""How a parameter lies in memory: the fused kernels pair entries by their place in memory, not by their index."""

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the entries fill one block of memory, each at a place of its own, in any order of the dimensions.

    True for row-major, transposed and channels_last tensors; False for a slice with gaps and for an expanded tensor.
    """
    # torch keeps the strides in a new tensor of the same kind exactly where they are dense.
    alike = torch.empty_like(tensor, device="meta").stride()
    return all(a == b for a, b, size in zip(alike, tensor.stride(), tensor.shape, strict=True) if size > 1)


def shares_places(tensor: Tensor) -> bool:
    """Whether several entries lie at one place in memory, so that nothing can be written to them one by one.

    >>> shares_places(torch.zeros(1).expand(3)), shares_places(torch.zeros(3, 4)[:, ::2])
    (True, False)
    """
    # Sorted by stride, each dimension must step over all that the smaller ones reach.
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
