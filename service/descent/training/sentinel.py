"""The divergence sentinel: every so many steps the replicas compare a hash of their whole state.

The state doesn't change while a step's forwards and backwards run, so it is hashed meanwhile. The
hashes are compared before the update, so a step on a corrupt state is never committed.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from descent.messages import Membership, Notice
from descent.training.collectives import Group
from descent.training.state import MODEL, TrainState

Digest = tuple[int, int, int]
"""(hash of the tensors in host memory, lower and upper half of the hash of those on the device): each below 2**32."""
_ROW = 1024


class Diverged(Exception):
    """The replicas' states differ, though they have taken the same steps; raised on all ranks alike."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks
        """The ranks that differ from the majority; all ranks where there is no majority."""
        super().__init__(f"ranks {', '.join(map(str, ranks))}")


class Sentinel:
    """Compares the replicas' bits before the update of every `every`-th step."""

    def __init__(self, state: TrainState, changing: Sequence[str], every: int | None) -> None:
        self._state = state
        self._changing = {MODEL + name for name in changing}
        self._every = every
        self._thread: ThreadPoolExecutor | None = None
        self._host: Future[int] | None = None
        self._device: Tensor | None = None

    def begin(self, step: int, world_size: int) -> None:
        """Start hashing the state that `step` begins with, if a comparison is due in this step."""
        self._host = None
        if self._every is None or step % self._every or world_size == 1:
            return
        # Buffers that the forward changes are copied; nothing else moves before the update.
        tensors = [
            t.detach().clone() if name in self._changing else t.detach() for name, t in self._state.tensors().items()
        ]
        self._device = hash_on_device([t for t in tensors if t.device.type != "cpu"])
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "sentinel")
        on_host = [t for t in tensors if t.device.type == "cpu"]
        self._host = self._thread.submit(hash_on_host, on_host)

    def compare(self, group: Group) -> None:
        """Exchange the hashes, if this step has any. Raises Diverged, or PeerLost."""
        if self._host is None:
            return
        low_high = torch.zeros(2, dtype=torch.float64, device=group.device)
        if self._device is not None:
            low_high = torch.stack([self._device & 0xFFFFFFFF, self._device >> 32 & 0xFFFFFFFF])
        table = torch.zeros(group.world_size, 3, dtype=torch.float64, device=group.device)
        table[group.rank, 0] = self._host.result()
        table[group.rank, 1:] = low_high  # below 2**32, and all others add 0: exact in float64
        self._host = None
        digests = [(int(a), int(b), int(c)) for a, b, c in group.sum_(table).tolist()]
        minority = minority_of(digests)
        if minority:
            raise Diverged(minority)


def minority_of(digests: Sequence[Digest]) -> tuple[int, ...]:
    """The ranks whose digest is not the most frequent one; all ranks where two digests are equally frequent.

    >>> minority_of([(1, 0, 0), (1, 0, 0), (2, 0, 0)]), minority_of([(1, 0, 0), (2, 0, 0)])
    ((2,), (0, 1))
    """
    (usual, most), *others = Counter(digests).most_common(2)
    if not others:
        return ()
    if others[0][1] == most:
        return tuple(range(len(digests)))
    return tuple(rank for rank, digest in enumerate(digests) if digest != usual)


def hash_on_host(tensors: Sequence[Tensor]) -> int:
    """The CRC-32 of all bytes: any flipped bit changes it. Python's lock is not held meanwhile."""
    found = 0
    for tensor in tensors:
        if tensor.numel():
            found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def hash_on_device(tensors: Sequence[Tensor]) -> Tensor | None:
    """A 64-bit hash of all tensors as a 0-d int64 tensor, still being computed; None for no tensors.

    Rows of 1,024 entries are combined by exclusive or, the rows by a sum with odd weights
    that depend on the position: any flipped bit changes the result.
    """
    rows = [part for tensor in tensors if tensor.numel() for part in _row_hashes(tensor)]
    if not rows:
        return None
    hashes = torch.cat(rows)
    weights = torch.arange(1, 2 * len(hashes), 2, device=hashes.device)
    # A weight's powers of two would lose upper bits; being odd it has none. Sums wrap around.
    return (hashes * weights).sum()


def _row_hashes(tensor: Tensor) -> list[Tensor]:
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.reshape(-1)
    bits = bits.view(sizes[bits.element_size()]) if bits.element_size() in sizes else bits.view(torch.uint8)
    whole = len(bits) - len(bits) % _ROW
    parts = [bits[:whole].view(-1, _ROW), bits[whole:].view(1, -1)]
    return [torch.hash_tensor(p, dim=1).view(torch.int64) for p in parts if p.numel()]


def notice(step: int, membership: Membership, ranks: tuple[int, ...]) -> Notice:
    """The notice that `ranks` differ in the state that `step` began with; every rank sends it."""
    if len(ranks) == membership.world_size:
        finding = "the replicas differ, and no majority of them agrees"
    else:
        finding = f"rank {', '.join(map(str, ranks))}: not the bits of the other replicas"
    detail = f"{finding}, in the state after step {step - 1}; step {step} was not committed"
    rank = ranks[0] if len(ranks) == 1 else None
    return Notice("diverged", step, membership.generation, rank, detail, {"ranks": ranks})
