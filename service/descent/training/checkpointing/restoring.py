"""Restores a checkpoint on all members of a generation: each reads and verifies a share, then they exchange shares.

A rank reads before it joins the process group, since reading may take as long as a disk or a
server takes, and no rank should wait for that inside a collective. A rank that could not read its
share, or whose share doesn't fit this run's state, joins as well and reports that in the first
collective, so that the restore succeeds or fails on all ranks alike.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from descent.checkpoint.manifest import Manifest, read_manifest
from descent.checkpoint.reader import files_of_rank, read_files
from descent.errors import CheckpointError, DescentError
from descent.optim.modes import has_modes
from descent.storage import to_location
from descent.training.collectives import Group
from descent.training.loss_parameters import LOSS_EMA
from descent.training.loss_scale import SCALER
from descent.training.state import EMA, OPTIMIZER, TrainState, broadcast_state


class NotRestored(Exception):
    """The members do not have the state of the checkpoint: one had no share to give, or the state doesn't fit."""


class DoesNotFit(NotRestored):
    """The checkpoint is whole and not of this run's state: reading it again won't help."""


@dataclass(frozen=True)
class Share:
    """What one rank has read of a checkpoint, verified; or why it could not."""

    source: str
    manifest: Manifest | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    error: str = ""
    fits: bool = True
    """Whether the tensors have the names, shapes and dtypes of this run's state, as far as they are known."""


def read_share(source: str, rank: int, world_size: int, state: TrainState) -> Share:
    """This rank's files of a checkpoint, on the CPU. An error is returned, not raised: the other ranks must see it.

    state: what the checkpoint is to be loaded into; nothing in it changes.
    """
    try:
        target = to_location(source)
        manifest = read_manifest(target)
        names = files_of_rank(manifest, rank, world_size)
        tensors = read_files(target, manifest, names)
    except DescentError as error:
        return Share(source, error=str(error))
    problem = _misfit(tensors, state)
    if problem:
        return Share(source, error=f"{source}: is not of this run: {problem}", fits=False)
    return Share(source, manifest, tensors)


def _misfit(tensors: Mapping[str, Tensor], state: TrainState) -> str:
    """What is wrong with the first tensor that this run's state can't have; "" if there is none."""
    own = state.tensors()
    elementwise = type(state.optimizer).__module__.startswith(("torch.optim.", "descent.optim."))
    for name, tensor in tensors.items():
        if name.startswith((EMA, LOSS_EMA)) and state.ema is None and has_modes(state.optimizer):
            continue  # written for evaluation and export only
        if name.startswith(SCALER):
            continue  # of no use, or not needed, in another precision
        if not name.startswith(OPTIMIZER):
            if name not in own:
                return f"this run's state has no {name}"
            if (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype):
                return f"{name} is {_described(tensor)}, this run's is {_described(own[name])}"
            continue
        parameter = own.get(state.name_of(name.removeprefix(OPTIMIZER).rpartition("/")[0]))
        if parameter is None:
            return f"{name} belongs to no parameter of this model"
        # torch's optimizers keep numbers, tensors like the parameter, and (Adafactor) sums over its dimensions
        like = tensor.dim() == parameter.dim() and all(
            a in (1, b) for a, b in zip(tensor.shape, parameter.shape, strict=True)
        )
        if elementwise and tensor.dim() and not like:
            return f"{name} is {_described(tensor)}, its parameter {_described(parameter)}"
    return ""


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def exchange(group: Group, share: Share, state: TrainState, device: torch.device) -> None:
    """Put the shares of all members together, on each of them, and load them into its state.

    Raises, on all ranks alike, NotRestored when one has no share to give, DoesNotFit when the
    shares together are not a state of this run; PeerLost when a member is gone.
    """
    _agree(group, share, device)
    assert share.manifest is not None
    tensors: dict[str, Tensor] = {}
    for owner in range(group.world_size):
        received, _ = broadcast_state(group, owner, share.tensors if owner == group.rank else None, device)
        tensors.update(received)
    try:
        manifest = share.manifest
        state.load(tensors, manifest.step, manifest.scalars, manifest.frozen, manifest.names)
    except (CheckpointError, KeyError, TypeError, ValueError, RuntimeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DoesNotFit(f"{share.source}: is not of this run: {what}") from error


def _agree(group: Group, share: Share, device: torch.device) -> None:
    """Raise NotRestored unless all ranks have a share, and of one and the same checkpoint."""
    votes = torch.zeros(2, group.world_size, dtype=torch.int64, device=device)
    votes[0, group.rank] = int(bool(share.error))
    votes[1, group.rank] = int(hashlib.sha256(repr(share.manifest).encode()).hexdigest()[:15], 16)
    failed, manifests = group.sum_(votes).tolist()
    if share.error:
        raise (NotRestored if share.fits else DoesNotFit)(share.error)
    if any(failed):
        raise NotRestored(f"{share.source}: rank {failed.index(1)} could not read its share")
    if len(set(manifests)) > 1:
        raise NotRestored(f"{share.source}: was replaced while it was being read")
