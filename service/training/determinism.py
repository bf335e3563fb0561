"""`reduction=exact` on a GPU: only kernels that add in one order, whatever runs beside them."""

import os

import torch

from service.errors import TrainingError


def only_deterministic(device: torch.device) -> None:
    """Let torch take deterministic kernels alone from now on, in the whole process; a CPU's are that anyway."""
    if device.type != "cuda":
        return
    # cuBLAS reads it when it makes its first handle; without it torch refuses its kernels.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Memory that nobody has written yet needs no defined content, and filling it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def refuse_undeterministic(error: BaseException) -> None:
    """Raise TrainingError if `error` is torch's about an operation that has no deterministic kernel."""
    if "does not have a deterministic implementation" in str(error):
        raise TrainingError(
            f"reduction=exact: {str(error).split(',')[0].splitlines()[0]} on this device; "
            "use reduction=fast, which doesn't promise equal bits"
        ) from error
