"""The only place that imports torch.distributed: join, sum, exchange, broadcast, leave.

One `Group` is one generation. A thread that waits inside gloo for a peer that hangs, or that has
left, would wait until the group's time-out, and gloo has no abort. So a group that is abandoned
closes its own connections: every collective under way fails at once on this rank, and on the
others as soon as they see the connection end.
"""

import contextlib
import datetime
import inspect
import os
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

_BUFFERS = (
    "forward_sync_buffers"  # torch 2.13's name
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
_SLICE = datetime.timedelta(milliseconds=100)
_LOST = (
    "gloo",
    "nccl",
    "connection",
    "timed out",
    "timeout",
    "broken pipe",
    "peer",
    "socket",
    "aborted",
    "store",
)
_NEVER_SENT = 0x0FF
"""The tag of a message that no rank ever sends."""
_AT_ONCE = datetime.timedelta(milliseconds=1)
_WEDGED = datetime.timedelta(seconds=600)
_CONNECT_S = 4.0
"""Time for connecting to members that were all present a moment ago; one may have died since."""
_CONNECT_PER_MEMBER_S = 0.01

_held: deque[dist.ProcessGroup] = deque()
"""The last process groups, kept beyond their end. Were DDP's reducer the last holder of a group, the
group would be destroyed under Python's lock, while gloo's thread needs that lock to release its last
tensors, and both would wait for ever. A group that is released here is destroyed without the lock."""


class PeerLost(Exception):
    """A collective can't be finished: a peer is gone, or the controller aborted the generation."""


class Work(Protocol):
    """A collective under way, as torch gives it."""

    def wait(self, timeout: datetime.timedelta = ..., /) -> bool: ...

    def is_completed(self) -> bool: ...


class Store:
    """The rendezvous store; the controller's process hosts it, so that it survives every worker."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as listener:
            # Bound here, because the store by itself would listen on every interface.
            listener.bind((host, 0))
            listener.listen(512)
            self.host, self.port = host, int(listener.getsockname()[1])
            self._server = TCPStore(
                host,
                self.port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
                use_libuv=True,
            )


class Group:
    """The members of one generation and the collectives between them."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: torch.device,
        abort: threading.Event,
        backend: str = "gloo",
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._nccl = backend == "nccl"
        self._abort = abort
        self._processes: dist.ProcessGroup | None = None
        self._closed = threading.Event()
        self._abandoned = False

    def _check(self) -> None:
        if self._abort.is_set():
            raise PeerLost("the controller aborted this generation")
        if self._abandoned:
            raise PeerLost("the connections of this generation were closed")

    def synchronize(self) -> None:
        """With NCCL, wait for the collectives launched so far. Raises PeerLost where one was cut short.

        An aborted collective of NCCL ends on the device like one that succeeded, with whatever its
        buffers hold by then: no result of a collective may be used before this returns.
        """
        if self.world_size > 1 and self._nccl:
            torch.cuda.current_stream(self.device).synchronize()
            self._check()

    def wait(self, work: Work | None) -> None:
        """Wait for an asynchronous collective. Raises PeerLost when it fails or is aborted."""
        if work is None:
            return
        ended = False
        while True:
            try:
                work.wait() if self._nccl else work.wait(_SLICE)
                return
            except RuntimeError as error:
                if "timed out" in str(error).lower() and not ended:
                    self._check()
                    # The collective may have ended just after this slice: wait once more to see how.
                    ended = work.is_completed()
                    continue
                raise PeerLost(in_short(error)) from error

    def sum_async(self, tensor: Tensor) -> Work | None:
        """Start summing `tensor` over the ranks, in place; None where this is the only rank. Raises PeerLost."""
        if self.world_size == 1:
            return None
        with _translated():
            return dist.all_reduce(tensor, async_op=True)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place. Raises PeerLost."""
        self.wait(self.sum_async(tensor))
        self.synchronize()
        return tensor

    def exchange_async(self, output: Tensor, send: Tensor, output_sizes: list[int], send_sizes: list[int]) -> Work:
        """Start an all-to-all of 1-D tensors: rank r receives the r-th piece of every rank's `send`, in rank order.

        output_sizes: entries from each rank. send_sizes: entries for each rank. Raises PeerLost.
        """
        with _translated():
            return dist.all_to_all_single(output, send, output_sizes, send_sizes, async_op=True)

    def gather_async(self, output: Tensor, piece: Tensor) -> Work:
        """Start gathering equal 1-D pieces into `output`, in the order of the ranks. Raises PeerLost."""
        with _translated():
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            return gather(output, piece, async_op=True)

    def broadcast_(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrite `tensors` with those of the rank `source`. Raises PeerLost."""
        if self.world_size == 1:
            return
        with _translated():
            works = [dist.broadcast(tensor, src=source, async_op=True) for tensor in tensors]
        for work in works:
            self.wait(work)
        self.synchronize()

    def data_parallel(self, model: nn.Module, find_unused: bool) -> DistributedDataParallel:
        """`model` in torch's DistributedDataParallel, which averages gradients over the ranks while the backward runs."""
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are averaged over slots, not overwritten by rank 0's. The replicas are equal
        # already: without init_sync a regroup costs 1 ms instead of 170.
        # No hook of our own: Python called on gloo's thread deadlocks with the group's end.
        no_buffers: dict[str, Any] = {_BUFFERS: False}
        return DistributedDataParallel(
            model,
            device_ids=device_ids,
            gradient_as_bucket_view=True,
            find_unused_parameters=find_unused,
            init_sync=False,
            **no_buffers,
        )

    def watch(self, processes: dist.ProcessGroup) -> None:
        """From now on an abort closes this group's connections, also while a thread waits in them."""
        self._processes = processes
        threading.Thread(target=self._watch, name="abort", daemon=True).start()

    def _watch(self) -> None:
        while not self._closed.wait(_SLICE.total_seconds()):
            if self._abort.is_set():
                self.abandon()
                return

    def abandon(self) -> None:
        """Close the connections: whatever is under way fails at once, here and with the peers."""
        processes = self._processes
        if processes is None:
            return
        self._abandoned = True
        if self._nccl:
            with contextlib.suppress(RuntimeError, AttributeError):
                processes._get_backend(self.device).abort()
            return
        # gloo closes all of a group's connections when one wait in the group times out. So wait for a
        # millisecond for a message that no rank sends. (Shutting the sockets down is not enough: a
        # socket on which a message had begun to arrive for a collective that has failed since is
        # never read again, so gloo's thread would not see the socket's end and would spin.)
        for peer in set(range(self.world_size)) - {self.rank}:
            with contextlib.suppress(RuntimeError):
                processes.recv([torch.zeros(1)], peer, _NEVER_SENT).wait(_AT_ONCE)

    def close(self) -> None:
        """Leave the generation; collectives that are still under way are dropped."""
        self._closed.set()
        self._processes = None
        if self.world_size > 1 and dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error`, raised by DDP inside a forward or backward, means that a peer is gone."""
    if isinstance(error, PeerLost | dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _LOST)


def in_short(error: BaseException) -> str:
    """A collective's error in one line, without the place in gloo's source and without gloo's advice."""
    line = re.sub(r"^\[[^\]]*\]\s*", "", str(error).splitlines()[0])
    return line.partition(" This is typically caused by")[0][:300]


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(in_short(error)) from error


def join(
    *,
    generation: int,
    rank: int,
    world_size: int,
    host: str,
    port: int,
    device: torch.device,
    backend: str,
    abort: threading.Event,
) -> Group:
    """Become rank `rank` of a new generation; returns when all members have joined. Raises PeerLost.

    backend: "nccl", or "gloo", which takes tensors on a GPU too, through the host's memory. abort: set by
    another thread to end the joining, and later every collective.

    The members first wait for each other in the store under this generation's prefix, in a loop that
    can be aborted, and only then connect to each other, which can't be aborted.
    """
    group = Group(rank, world_size, device, abort, backend)
    if world_size == 1:
        return group
    with _translated():
        client = TCPStore(
            host,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=20),
        )
        store = PrefixStore(f"generation/{generation}", client)
        _meet(group, store, "here")
        if dist.is_initialized():
            dist.destroy_process_group()
        _connect(store, rank, world_size, backend)
        processes = dist.distributed_c10d._get_default_group()
        _hold(processes)
        # No member computes, and so none can die while computing, before all are connected.
        _meet(group, store, "connected")
        if backend == "gloo":
            dist.distributed_c10d._set_pg_timeout(_WEDGED)
        group.watch(processes)
    return group


def _connect(store: PrefixStore, rank: int, world_size: int, backend: str) -> None:
    """Start torch's process group, and put right what that start leaves behind in this process."""
    # torch names the meeting by the number of groups that this process has started, failed attempts
    # included. Without this a member that once failed to connect would for ever after wait under a
    # number that no other member has.
    dist.distributed_c10d._world.group_count = 0
    hook = sys.excepthook  # wrapped once more by each start
    patience_s = _CONNECT_S + _CONNECT_PER_MEMBER_S * world_size
    # By default torch ends the whole process when NCCL reports a lost peer. The survivors must go on;
    # the controller aborts the generation.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=_WEDGED if backend == "nccl" else datetime.timedelta(seconds=patience_s),
        )
    finally:
        sys.excepthook = hook


def _hold(processes: dist.ProcessGroup) -> None:
    """Keep this process group and the last one; release an older one, on a thread of its own since that may take long."""
    _held.append(processes)
    if len(_held) > 2:
        threading.Thread(target=_held.popleft, name="release group", daemon=True).start()


def _meet(group: Group, store: PrefixStore, place: str) -> None:
    """Wait until all members have reached this place. Raises PeerLost where the controller aborts."""
    store.set(f"{place}/{group.rank}", "1")
    everyone = [f"{place}/{r}" for r in range(group.world_size)]
    while not store.check(everyone):
        group._check()
        time.sleep(0.002)


def leave() -> None:
    """Drop the process group of an earlier generation, if there is one."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
