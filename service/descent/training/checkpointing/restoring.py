"""A checkpoint into the state of all members of a generation: each reads and verifies a share, then they exchange.

Reading comes before the members meet, since it may take as long as a disk or a server takes:
nobody waits for it inside a collective. A rank that could not read its share, or whose share
doesn't fit this run's state, comes to the meeting all the same and says so there, so that all
ranks have the same outcome.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from descent.checkpoint.manifest import Manifest, read_manifest
from descent.checkpoint.reader import files_of_rank, read_files
from descent.errors import DescentError
from descent.storage import to_location
from descent.training.collectives import Group
from descent.training.state import TrainState, broadcast_state


class NotRestored(Exception):
    """A member has no share of the checkpoint to give: no member's state has changed."""


@dataclass(frozen=True)
class Share:
    """What one rank has read of a checkpoint, verified; or why it could not."""

    source: str
    manifest: Manifest | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    error: str = ""


def read_share(source: str, rank: int, world_size: int) -> Share:
    """This rank's files of a checkpoint, on the CPU. An error is returned, not raised: the other ranks must see it."""
    try:
        target = to_location(source)
        manifest = read_manifest(target)
        names = files_of_rank(manifest, rank, world_size)
        return Share(source, manifest, read_files(target, manifest, names))
    except DescentError as error:
        return Share(source, error=str(error))


def exchange(group: Group, share: Share, state: TrainState, device: torch.device) -> None:
    """Put the shares of all members together, on each of them, and load them into its state.

    Raises NotRestored, on all ranks alike, when one has no share to give; PeerLost when one
    is gone; CheckpointError when the checkpoint doesn't fit the model.
    """
    _agree(group, share, device)
    assert share.manifest is not None
    tensors: dict[str, Tensor] = {}
    for owner in range(group.world_size):
        received, _ = broadcast_state(group, owner, share.tensors if owner == group.rank else None, device)
        tensors.update(received)
    state.load(tensors, share.manifest.step, share.manifest.scalars)


def _agree(group: Group, share: Share, device: torch.device) -> None:
    """Raise NotRestored unless all ranks have a share, and of one and the same checkpoint."""
    votes = torch.zeros(2, group.world_size, dtype=torch.int64, device=device)
    votes[0, group.rank] = int(bool(share.error))
    votes[1, group.rank] = int(hashlib.sha256(repr(share.manifest).encode()).hexdigest()[:15], 16)
    failed, manifests = group.sum_(votes).tolist()
    if share.error:
        raise NotRestored(share.error)
    if any(failed):
        raise NotRestored(f"{share.source}: rank {failed.index(1)} could not read its share")
    if len(set(manifests)) > 1:
        raise NotRestored(f"{share.source}: was replaced while it was being read")
