"""`reduction=exact`: only kernels that add in one order, whatever runs beside them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from descent.data.generators import seed_generators
from descent.errors import TrainingError


def only_deterministic(device: torch.device) -> None:
    """Let torch take deterministic kernels alone from now on, in the whole process.

    On a CPU too: with several threads the gradient of `x[index]` is added up by whoever comes first.
    """
    torch.use_deterministic_algorithms(True)
    # Memory that nobody has written yet needs no defined content, and filling it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        # cuBLAS reads it when it makes its first handle; without it torch refuses its kernels.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Deterministic kernels alone, within the block; or, if not `wanted`, whatever goes outside of it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def begin_stream(seed: int, device: torch.device, uses_non_torch_rng: bool) -> None:
    """From here on a model draws what this seed decides.

    uses_non_torch_rng: from Python's and NumPy's generators too, which few models do.
    """
    if uses_non_torch_rng:
        seed_generators(seed)
    else:
        torch.default_generator.manual_seed(seed)  # a microsecond; torch.manual_seed takes 70
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def compiled(model: nn.Module, exact: bool) -> nn.Module:
    """`model` through torch.compile.

    exact: a kernel for each size of a micro-batch. Left to itself torch makes one for all sizes
    when it meets the second, which adds in another order than the one for the first size alone;
    which comes second depends on the slots that a worker has.
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
