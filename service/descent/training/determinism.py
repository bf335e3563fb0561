"""`reduction=exact`: only kernels that add in one order, whatever else runs at the same time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from descent.data.generators import seed_generators
from descent.errors import TrainingError


def only_deterministic(device: torch.device) -> None:
    """From now on torch uses deterministic kernels only, in the whole process.

    On a CPU too: there several threads add up the gradient of `x[index]` in the order in which they finish.
    """
    torch.use_deterministic_algorithms(True)
    # Memory that has not been written yet needs no defined content, and filling it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        # cuBLAS reads the variable when it makes its first handle; without it torch refuses cuBLAS kernels.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within the block only deterministic kernels; if not `wanted`, the same kernels as outside."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def begin_stream(seed: int, device: torch.device, uses_non_torch_rng: bool) -> None:
    """Seed the generators from which model and loss draw.

    uses_non_torch_rng: seed Python's and NumPy's generators too, from which few models draw.
    """
    if uses_non_torch_rng:
        seed_generators(seed)
    else:
        torch.default_generator.manual_seed(seed)  # a microsecond; torch.manual_seed takes 70
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def compiled(model: nn.Module, exact: bool) -> nn.Module:
    """`model` through torch.compile.

    exact: compile one kernel for each size of a micro-batch. By default torch compiles one kernel for all
    sizes when it meets the second size, and that kernel adds in another order than the first one; which
    size comes second depends on the slots that a worker has.
    """
    forward: Any = torch.compile(model, dynamic=False if exact else None)
    module: nn.Module = forward
    return module


def refuse_undeterministic(error: BaseException) -> None:
    """Raise TrainingError if `error` is torch's about an operation that has no deterministic kernel."""
    if "does not have a deterministic implementation" in str(error):
        raise TrainingError(
            f"reduction=exact: {str(error).split(',')[0].splitlines()[0]} on this device; "
            "use reduction=fast, which doesn't promise equal bits"
        ) from error
