"""The only place that imports torch.distributed: join, sum, exchange, broadcast, leave.

One `Group` is one generation. Every wait is cut into short slices between which the
abort flag is looked at, because gloo can't be aborted while a peer merely hangs: a
thread that waits inside it would sit there until the group's time-out.
"""

import contextlib
import datetime
import inspect
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket, PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks  # noqa: F401 — registers with DDP
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
_WEDGED = datetime.timedelta(seconds=600)


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

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite `tensors` with rank 0's."""
        if self.world_size == 1:
            return
        with _translated():
            works = [dist.broadcast(tensor, src=0, async_op=True) for tensor in tensors]
        for work in works:
            self.wait(work)

    def data_parallel(self, model: nn.Module, find_unused: bool) -> DistributedDataParallel:
        """`model` under torch's reducer, whose buckets are summed (not averaged) while the backward runs."""
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are averaged over slots, not overwritten by rank 0's. The replicas are equal
        # already: without init_sync a regroup costs 1 ms instead of 170.
        no_buffers: dict[str, Any] = {_BUFFERS: False}
        wrapped = DistributedDataParallel(
            model, device_ids=device_ids, gradient_as_bucket_view=True,
            find_unused_parameters=find_unused, init_sync=False, **no_buffers,
        )  # fmt: skip

        def sum_bucket(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
            work = dist.all_reduce(bucket.buffer(), async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

        wrapped.register_comm_hook(None, sum_bucket)
        return wrapped

    def close(self) -> None:
        """Leave the generation; what is still under way is dropped."""
        if self.world_size > 1 and dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


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
        store.set(f"here/{rank}", "1")
        everyone = [f"here/{r}" for r in range(world_size)]
        while not store.check(everyone):
            group._check()
            time.sleep(0.002)
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store, rank=rank, world_size=world_size, timeout=_WEDGED,
        )  # fmt: skip
    return group


def leave() -> None:
    """Drop the process group of an earlier generation, if there is one."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
