"""Parameters that no training changes, and checkpoints without them.

The base model of an adapter (LoRA) may be a thousand times larger than what is trained. Such a checkpoint holds what is
trained, and the digest of the rest: whoever restores it builds the base model again from the run's config, and is
refused where that has become another one.
"""

from typing import Literal

import torch
import xxhash
from torch import Tensor, nn

from descent.errors import CheckpointError
from descent.storage import Location


def frozen_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter, for those with requires_grad=False; a tied one under its first name, as in a checkpoint."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad and id(tensor) not in seen:
            found[name] = tensor.detach()
        seen.add(id(tensor))
    return found


def are_left_out(model: nn.Module, save_frozen: bool | Literal["auto"]) -> bool:
    """Whether the checkpoints of this model go without its frozen parameters.

    save_frozen: `checkpoint.save_frozen`; auto saves them except for models with adapters of peft.
    """
    saved = not hasattr(model, "peft_config") if save_frozen == "auto" else save_frozen
    return not saved and bool(frozen_parameters(model))


def digest_of(tensors: dict[str, Tensor]) -> str:
    """XXH3 over names, dtypes, shapes and bytes."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_same(model: nn.Module, digest: str, source: Location | str) -> dict[str, Tensor]:
    """The frozen parameters of a model, which a checkpoint at `source` goes without.

    digest: of the frozen parameters that the checkpoint's run had. Raises CheckpointError where the model's are others.
    """
    own = frozen_parameters(model)
    if digest_of(own) != digest:
        raise CheckpointError(
            f"{source}: holds only what was trained, and the frozen parameters of the model ({len(own)} tensors) are not "
            "those that it was trained with: the base model, or the file that it comes from, has changed; put that back"
        )
    return own
