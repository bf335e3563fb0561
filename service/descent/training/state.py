"""`TrainState`: all that isn't a pure function of (config, step).

A new member receives it, a checkpoint holds it, and the hash of a run is taken over it. The tensors
are named one by one, so that a holder need not have all of them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from descent.checkpoint.frozen import require_same
from descent.checkpoint.manifest import digest_of_names
from descent.errors import CheckpointError
from descent.optim.ema import Ema
from descent.optim.modes import as_evaluated, has_modes
from descent.optim.optimizer_state import load_named_state, named_state
from descent.optim.plateau import Plateau
from descent.training.collectives import Group
from descent.training.loss_parameters import LOSS, LOSS_EMA, attached, state_name
from descent.training.loss_scale import LossScale

MODEL, OPTIMIZER, EMA = "model/", "optimizer/", "ema/"


@dataclass
class TrainState:
    """Parameters, buffers, optimizer state, step; where used, averaged weights, a plateau's memory and the loss scale."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int], float]
    """Number of updates so far -> multiplier of the learning rate."""
    ema: Ema | None = None
    step: int = 0
    evaluated: int = -1
    """The last step after which there was an evaluation."""
    bad_steps: int = 0
    """Steps in a row that were skipped because a gradient wasn't finite."""
    best: float | None = None
    """The best value so far of the metric by which checkpoints are kept, where there is one."""
    loss_scale: LossScale | None = None
    """The factor on the loss, in float16."""

    stop_best: float | None = None
    """The best value so far of the metric that may end the run early."""
    stop_waited: int = 0
    """Evaluations in a row without progress in it."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name, sorted by name; the tensors themselves, not copies."""
        found = {self.name_of(name): tensor for name, tensor in _module_tensors(self.model)}
        found.update({OPTIMIZER + name: t for name, t in named_state(self.optimizer).items()})
        if self.ema is not None:
            found.update({self._name_of_average(name): t for name, t in self.ema.shadow.items()})
        if self.loss_scale is not None:
            found.update(self.loss_scale.tensors())
        return dict(sorted(found.items()))

    def name_of(self, name: str) -> str:
        """The name in this state of a parameter or buffer of the model."""
        return state_name(name, attached(self.model), MODEL, LOSS)

    def _name_of_average(self, name: str) -> str:
        return state_name(name, attached(self.model), EMA, LOSS_EMA)

    def scalars(self) -> dict[str, float]:
        """The numbers of the state: counters, the best metric, and the memory of a plateau schedule."""
        memory = self.schedule.state_dict() if isinstance(self.schedule, Plateau) else {}
        best = {} if self.best is None else {"best_score": self.best}
        if self.stop_best is not None:
            best |= {"stop_best": self.stop_best, "stop_waited": self.stop_waited}
        return {**memory, **best, "evaluated": self.evaluated, "bad_steps": self.bad_steps}

    def load(
        self,
        tensors: Mapping[str, Tensor],
        step: int,
        scalars: Mapping[str, float],
        frozen: str = "",
        names: str = "",
    ) -> None:
        """Replace the state by this one. Raises CheckpointError when names or shapes don't fit this model.

        frozen: the digest of the frozen parameters, where the tensors go without them; the model's own must be the same.
        names: the digest of the names of all tensors as they were written, where that is known: of the optimizer's
        state nothing may be missing, though a parameter without a gradient has none.
        """
        own = dict(_module_tensors(self.model))
        given = {n.removeprefix(MODEL): t for n, t in tensors.items() if n.startswith(MODEL)}
        given |= {name: tensors[self.name_of(name)] for name in attached(self.model) if self.name_of(name) in tensors}
        if frozen:
            given = {**require_same(self.model, frozen, f"step {step}"), **given}
        wrong = sorted(own.keys() ^ given.keys()) or sorted(n for n in own if own[n].shape != given[n].shape)
        if wrong:
            raise CheckpointError(
                f"the state doesn't fit this model: {wrong[0]} is missing, unknown or of another shape"
            )
        if names and names != digest_of_names(tensors):
            raise CheckpointError(f"the tensors are not those that were written: {_first_gap(tensors)} is missing")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(given[name])
            if self.ema is not None:
                for name, shadow in self.ema.shadow.items():
                    shadow.copy_(tensors[self._name_of_average(name)])
        load_named_state(
            self.optimizer,
            {n.removeprefix(OPTIMIZER): t for n, t in tensors.items() if n.startswith(OPTIMIZER)},
        )
        if self.loss_scale is not None:
            self.loss_scale.load(tensors)
        if isinstance(self.schedule, Plateau):
            own_keys = ("evaluated", "bad_steps", "best_score", "stop_best", "stop_waited")
            memory = {k: v for k, v in scalars.items() if k not in own_keys and "/" not in k}
            self.schedule.load_state_dict(memory)
        self.evaluated, self.bad_steps = int(scalars["evaluated"]), int(scalars["bad_steps"])
        self.best, self.stop_best = scalars.get("best_score"), scalars.get("stop_best")
        self.stop_waited = int(scalars.get("stop_waited", 0))
        self.step = step

    def sha256(self) -> str:
        """The SHA-256 over step, names, shapes and bytes of the whole state."""
        digest = hashlib.sha256(f"step {self.step}\n".encode())
        for name, tensor in self.tensors().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(_bytes(tensor))
        return digest.hexdigest()

    def receive(self, group: Group, device: torch.device) -> None:
        """Take rank 0's state on every rank. Raises PeerLost."""
        if group.rank == 0:
            broadcast_state(group, 0, self.tensors(), device, {"step": self.step, "scalars": self.scalars()})
            return
        received, values = broadcast_state(group, 0, None, device)
        self.load(received, values["step"], values["scalars"])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the model has the weights to evaluate: the averaged ones, or what the optimizer gives for it."""
        with as_evaluated(self.optimizer) if self.ema is None else self.ema.swapped(self.model):
            yield

    def average(self, step: int) -> None:
        """Take the weights into the average, where there is one; `step` is 0 after the first update."""
        if self.ema is not None:
            with as_evaluated(self.optimizer):
                self.ema.update(self.model, step)

    def evaluated_weights(self) -> dict[str, Tensor]:
        """Copies of the weights to evaluate, as averages are named, where an optimizer alone can compute them."""
        if self.ema is not None or not has_modes(self.optimizer):
            return {}
        with as_evaluated(self.optimizer):
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            return {self._name_of_average(n): p.detach().clone() for n, p in trained}


def broadcast_state(
    group: Group,
    source: int,
    tensors: Mapping[str, Tensor] | None,
    device: torch.device,
    values: Mapping[str, Any] | None = None,
) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """The tensors and values of the rank `source`, on every rank. Raises PeerLost.

    tensors: on `source` only; the same tensors come back there, copies on `device` elsewhere. values: plain
    values, fit for JSON. First a description of the tensors travels as JSON, then the tensors do.
    """
    if group.rank == source:
        assert tensors is not None
        header = json.dumps(
            {
                "values": dict(values or {}),
                "tensors": [[n, str(t.dtype), list(t.shape)] for n, t in tensors.items()],
            }
        ).encode()
        size = torch.tensor([len(header)], dtype=torch.int64, device=device)
        group.broadcast_([size], source)
        raw = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(device)
        group.broadcast_([raw], source)
        group.broadcast_([t.detach().to(device).contiguous() for t in tensors.values()], source)
        return tensors, values or {}
    size = torch.zeros(1, dtype=torch.int64, device=device)
    group.broadcast_([size], source)
    raw = torch.empty(int(size), dtype=torch.uint8, device=device)
    group.broadcast_([raw], source)
    described = json.loads(bytes(raw.cpu().numpy().tobytes()))
    received = {
        name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)
        for name, dtype, shape in described["tensors"]
    }
    group.broadcast_(list(received.values()), source)
    return received, described["values"]


def _first_gap(tensors: Mapping[str, Tensor]) -> str:
    """What is most likely missing of an optimizer's state: what one parameter has and another doesn't."""
    keys = {name.rpartition("/")[2] for name in tensors if name.startswith(OPTIMIZER)}
    for parameter in sorted(name.removeprefix(MODEL) for name in tensors if name.startswith(MODEL)):
        here = {key for key in keys if f"{OPTIMIZER}{parameter}/{key}" in tensors}
        if here and here != keys:
            return f"{OPTIMIZER}{parameter}/{min(keys - here)}"
    return "the optimizer's state of a parameter, or another tensor,"


def _module_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, tensor) of parameters and persistent buffers; a tied weight once, under its first name."""
    persistent = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    found = []
    for name, tensor in persistent.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found.append((name, tensor.detach()))
    return found


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""
