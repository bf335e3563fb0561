"""A checkpoint into all members of a generation: each reads and verifies its share, then they exchange.

Reading comes before the members meet, where it may take as long as a disk or a server takes:
nobody waits for it inside a collective. Whoever could not read its share comes to the meeting
all the same and says so there, so that all of them have the same outcome.
"""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from descent.checkpoint import manifest as checkpoint
from descent.checkpoint.manifest import Manifest
from descent.errors import DescentError
from descent.storage import to_location
from descent.training.collectives import Group
from descent.training.state import TrainState, broadcast_state


class NotRestored(Exception):
    """Some member could not read its share of the checkpoint: none has taken anything over."""


@dataclass(frozen=True)
class Share:
    """What one rank has read of a checkpoint, verified; or why it could not."""

    source: str
    manifest: Manifest | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    error: str = ""


def read_share(source: str, rank: int, world_size: int) -> Share:
    """This rank's files of a checkpoint, on the CPU. Doesn't raise: the others wait to hear of it."""
    try:
        target = to_location(source)
        manifest = checkpoint.read_manifest(target)
        mine = checkpoint.shares(manifest, world_size)[rank]
        return Share(source, manifest, checkpoint.load_files(target, manifest, mine))
    except DescentError as error:
        return Share(source, error=str(error))


def exchange(group: Group, share: Share, state: TrainState, device: torch.device) -> None:
    """Put the members' shares together into everybody's state.

    Raises NotRestored, on all ranks alike, when one has no share to give; PeerLost when one
    is gone; CheckpointError when the checkpoint doesn't fit the model.
    """
    _agree(group, share, device)
    assert share.manifest is not None
    tensors: dict[str, Tensor] = {}
    for owner in range(group.world_size):
        theirs, _ = broadcast_state(group, owner, share.tensors if owner == group.rank else None, device)
        tensors.update(theirs)
    state.load(tensors, share.manifest.step, share.manifest.scalars)


def _agree(group: Group, share: Share, device: torch.device) -> None:
    """Whether all have their shares, and of one and the same checkpoint."""
    said = torch.zeros(2, group.world_size, dtype=torch.int64, device=device)
    said[0, group.rank] = int(bool(share.error))
    said[1, group.rank] = int(hashlib.sha256(repr(share.manifest).encode()).hexdigest()[:15], 16)
    failed, marks = group.sum_(said).tolist()
    if share.error:
        raise NotRestored(share.error)
    if any(failed):
        raise NotRestored(f"{share.source}: rank {failed.index(1)} could not read its share")
    if len(set(marks)) > 1:
        raise NotRestored(f"{share.source}: was replaced while it was being read")
