"""The only place that imports torch.distributed: join, sum, exchange, broadcast, leave.

One `Group` is one generation. gloo has no abort that works: a thread that waits inside it
for a peer that hangs, or that has left, would sit there until the group's time-out. So a
group knows its own connections and shuts them down when it is abandoned: whatever is
under way fails at once, here and, as they see the connection end, with the peers.
"""

import contextlib
import datetime
import inspect
import os
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

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
    "broken pipe",
    "peer",
    "socket",
    "aborted",
    "store",
)
_FAREWELL = 0x0FF
"""The tag of a message that nobody gets."""
_WEDGED = datetime.timedelta(seconds=600)
_CONNECT = datetime.timedelta(seconds=8)
"""For connecting to members that were all there a moment ago; one may have died since."""


_held: deque[dist.ProcessGroup] = deque()
"""The last process groups, kept beyond their end: were DDP's reducer the last to hold one, it
would be taken down under Python's lock, while gloo's thread needs that lock to put its last
tensors away, and both would wait for ever. Let go of here, it goes without the lock."""


class PeerLost(Exception):
    """A collective can't be finished: a peer is gone, or the controller aborted the generation."""


class Store:
    """The rendezvous store; the controller hosts it, so that it survives every worker."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as listener:
            # Bound by us: left to itself the store would listen on every interface.
            listener.bind((host, 0))
            listener.listen(512)
            self.host, self.port = host, int(listener.getsockname()[1])
            self._server = TCPStore(
                host, self.port, is_master=True, wait_for_workers=False,
                master_listen_fd=listener.detach(), use_libuv=True,
            )  # fmt: skip


class Group:
    """The members of one generation and the collectives between them."""

    def __init__(
        self, rank: int, world_size: int, device: torch.device, abort: threading.Event
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._abort = abort
        self._connections: set[int] = set()
        self._processes: dist.ProcessGroup | None = None
        self._closed = threading.Event()

    def _check(self) -> None:
        if self._abort.is_set():
            raise PeerLost("the controller aborted this generation")

    def wait(self, work: Any) -> None:
        """Wait for an asynchronous collective. Raises PeerLost when it fails or is aborted."""
        if work is None:
            return
        while True:
            try:
                work.wait(_SLICE) if self.device.type == "cpu" else work.wait()
                return
            except RuntimeError as error:
                if "timed out" in str(error).lower() and not work.is_completed():
                    self._check()
                    continue
                raise PeerLost(_short(error)) from error

    def sum_async(self, tensor: Tensor) -> Any:
        """Start summing `tensor` over the ranks, in place."""
        if self.world_size == 1:
            return None
        with _translated():
            return dist.all_reduce(tensor, async_op=True)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place."""
        self.wait(self.sum_async(tensor))
        return tensor

    def exchange_async(
        self, output: Tensor, send: Tensor, output_sizes: list[int], send_sizes: list[int]
    ) -> Any:
        """Start an all-to-all of 1-D tensors: rank r gets the r-th piece of everyone's `send`."""
        with _translated():
            return dist.all_to_all_single(output, send, output_sizes, send_sizes, async_op=True)

    def gather_async(self, output: Tensor, piece: Tensor) -> Any:
        """Start gathering equal 1-D pieces into `output`, in the order of the ranks."""
        with _translated():
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            return gather(output, piece, async_op=True)

    def broadcast_(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrite `tensors` with those of the rank `source`."""
        if self.world_size == 1:
            return
        with _translated():
            works = [dist.broadcast(tensor, src=source, async_op=True) for tensor in tensors]
        for work in works:
            self.wait(work)

    def data_parallel(self, model: nn.Module, find_unused: bool) -> DistributedDataParallel:
        """`model` under torch's reducer, whose buckets are averaged over the ranks while the backward runs."""
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are averaged over slots, not overwritten by rank 0's. The replicas are equal
        # already: without init_sync a regroup costs 1 ms instead of 170.
        # No hook of our own: Python called on gloo's thread deadlocks with the group's end.
        no_buffers: dict[str, Any] = {_BUFFERS: False}
        return DistributedDataParallel(
            model, device_ids=device_ids, gradient_as_bucket_view=True,
            find_unused_parameters=find_unused, init_sync=False, **no_buffers,
        )  # fmt: skip

    def watch(self, connections: set[int], processes: dist.ProcessGroup) -> None:
        """From now on an abort shuts these sockets (inode numbers) down, whoever waits in them."""
        self._connections, self._processes = connections, processes
        threading.Thread(target=self._watch, name="abort", daemon=True).start()

    def _watch(self) -> None:
        while not self._closed.wait(_SLICE.total_seconds()):
            if self._abort.is_set():
                self.abandon()
                return

    def abandon(self) -> None:
        """Shut the connections down: the peers need not wait for a member that won't go on."""
        for number, connection in _tcp_sockets():
            if number in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        # A connection on which a message had begun to arrive for a collective that has failed
        # since is never read again by gloo, so it would not see the end: it would spin, and
        # whoever else waits for that peer would do so for ever. What can't be sent, it sees.
        processes = self._processes
        if processes is not None:
            for peer in set(range(self.world_size)) - {self.rank}:
                with contextlib.suppress(RuntimeError):
                    processes.send([torch.zeros(1)], peer, _FAREWELL)

    def close(self) -> None:
        """Leave the generation; what is still under way is dropped."""
        self._closed.set()
        self._processes = None
        if self.world_size > 1 and dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def _tcp_sockets() -> Iterator[tuple[int, socket.socket]]:
    """(inode number, a duplicate that is closed afterwards) of this process's TCP sockets."""
    for name in os.listdir("/dev/fd"):
        try:
            status = os.fstat(int(name))
            if not stat.S_ISSOCK(status.st_mode):
                continue
            found = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # closed since it was listed
        with found:
            if (
                found.family in (socket.AF_INET, socket.AF_INET6)
                and found.type == socket.SOCK_STREAM
            ):
                yield status.st_ino, found


def _listening() -> dict[int, int]:
    """Inode number -> port of the sockets that this process listens on."""
    return {
        number: found.getsockname()[1]
        for number, found in _tcp_sockets()
        if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    }


def _connected_through(ports: set[int]) -> set[int]:
    """Inode numbers of the connections with one end at one of these ports."""
    numbers = set()
    for number, found in _tcp_sockets():
        with contextlib.suppress(OSError):  # not connected
            if {found.getsockname()[1], found.getpeername()[1]} & ports:
                numbers.add(number)
    return numbers


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error`, raised inside a backward by the reducer, means that a peer is gone."""
    if isinstance(error, PeerLost | dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _LOST)


def _short(error: BaseException) -> str:
    return str(error).splitlines()[0][:300]


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(_short(error)) from error


def join(
    *, generation: int, rank: int, world_size: int, host: str, port: int, device: torch.device,
    abort: threading.Event,
) -> Group:  # fmt: skip
    """Become rank `rank` of a new generation; returns when all its members are there.

    The members first meet in the store under a prefix of this generation, in a loop that
    can be aborted, and only then connect to each other, which can't.
    """
    group = Group(rank, world_size, device, abort)
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
        _meet(group, store, "here", "1")
        if dist.is_initialized():
            dist.destroy_process_group()
        earlier = {number for number, _ in _tcp_sockets()}
        listening = _listening()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store, rank=rank, world_size=world_size,
            timeout=_WEDGED if device.type == "cuda" else _CONNECT,
        )  # fmt: skip
        processes = dist.distributed_c10d._get_default_group()
        _hold(processes)
        opened = [port for number, port in _listening().items() if number not in listening]
        # Nobody computes, and so nobody can die of it, before all are connected.
        answers = _meet(group, store, "connected", ",".join(map(str, opened)))
        if device.type == "cpu":
            dist.distributed_c10d._set_pg_timeout(_WEDGED)
            ports = {int(port) for answer in answers for port in answer.split(",") if port}
            group.watch(_connected_through(ports) - earlier, processes)
    return group


def _hold(processes: dist.ProcessGroup) -> None:
    """Keep this process group and the last one; let an older one go, on a thread of its own since its end may take long."""
    _held.append(processes)
    if len(_held) > 2:
        threading.Thread(target=_held.popleft, name="let go", daemon=True).start()


def _meet(group: Group, store: PrefixStore, place: str, word: str) -> list[str]:
    """Wait, as long as nobody aborts, until all members have said their word; the words by rank."""
    store.set(f"{place}/{group.rank}", word)
    everyone = [f"{place}/{r}" for r in range(group.world_size)]
    while not store.check(everyone):
        group._check()
        time.sleep(0.002)
    return [store.get(key).decode() for key in everyone]


def leave() -> None:
    """Drop the process group of an earlier generation, if there is one."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
