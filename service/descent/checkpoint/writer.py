"""Writes a rank's share of a checkpoint to disk or S3 while the training goes on.

    write()   lays the share's files out in a buffer, starts the threads below and returns
    copier    one thread that copies the tensors into the buffer, file after file, while the next step
              computes its gradients; `wait_for_copy()` must come before anything that changes them
    writers   threads that hash and write each file as soon as it is copied: to disk slowly, while
              nobody waits for the file, to S3 as fast as the network goes

The buffer, as large as the share, is kept for the next checkpoint. Copying, hashing and writing
are calls into C that release the interpreter's lock, so threads suffice; those that aren't slowed
down have a low priority, to leave the cores to the training.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from descent.checkpoint.manifest import DIGESTS, digest_of_names, file_name, partition, step_dir
from descent.checkpoint.safetensors_file import Layout, layout
from descent.errors import StoreError
from descent.messages import FileWritten, ShareWritten
from descent.storage import Location, open_store
from descent.storage.direct_io import BLOCK

_NICE = 10
_DUTY = 0.03
"""The part of a core that writing to disk takes while nobody waits for it: the training shares memory and caches."""
_OF_INTERVAL = 0.5
"""Writing takes at most about this part of the time between two checkpoints: the next one needs the buffer."""
_LONGEST_S = 120.0
"""And at most about this long, where a core can do it: an unfinished checkpoint is of no use."""
_SPEED = 1e9
"""Bytes a second that one core is taken to hash and write, until a checkpoint has shown it."""
_SMALL = 16 << 20
"""A share of fewer bytes is written at once, without rests."""
_PIECE = 4 << 20
_FILE_BYTES = 64 << 20
_MOST_FILES = 4
"""Of a group, a rank writes about one file for so many bytes, and at most so many files."""
_UPLOADS = 3
"""Files under way to S3 at a time, each in several parts: while the server joins one file's parts, it receives another's."""
_LONGEST_REST_S = 1.0


@dataclass(frozen=True)
class _File:
    """One file of the share."""

    name: str
    offset: int
    """Where it begins in the buffer."""
    layout: Layout

    @property
    def tensors(self) -> list[str]:
        """The names of its tensors in the state, in the order of its layout."""
        group = self.name.partition("-")[0]
        return [f"{group}/{inner}" for inner in self.layout.spans]


class ShareWriter:
    """Writes one rank's share under `root`; one checkpoint at a time, from one buffer.

    report: called from a thread with the outcome of each `write`, good or bad.
    """

    def __init__(self, root: Location, report: Callable[[ShareWritten], None]) -> None:
        self.root = root
        self._report = report
        self._copier = ThreadPoolExecutor(1, "copier")  # normal priority: an update may be waiting for the copy
        # These run `_write_files`, and the hashes of its files. On disk they rest between pieces until somebody
        # waits, and must then be fast: a thread can't take a lower priority back.
        rests = isinstance(root, Path)
        self._writers = ThreadPoolExecutor(8, "writer", initializer=None if rests else _lower_priority)
        self._uploaders = ThreadPoolExecutor(_UPLOADS, "uploader", initializer=_lower_priority)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._copies: list[Future[Any]] = []
        """One for each file, in their order."""
        self._writing: Future[None] | None = None
        self._hurry = threading.Event()
        """Set while somebody waits for the files."""
        self._copy_at_once = False
        """A tensor was changed during the copy, by something that didn't wait: from now on `write` copies itself."""
        self._stalled_s = 0.0
        self._began = 0.0
        self._duty = _DUTY
        self._worked_s = 0.0
        """Seconds of one core that writing the last share took."""

    def write(
        self,
        tensors: Mapping[str, Tensor],
        *,
        step: int,
        rank: int,
        world_size: int,
        generation: int,
        scalars: Mapping[str, float],
        copy_now: Collection[str] = (),
        patience_s: float | None = None,
        frozen: str = "",
    ) -> None:
        """Write this rank's share of the tensors, whose names are "model/…", "optimizer/…" or "ema/…".

        Returns before they are copied: call `wait_for_copy()` before any tensor is changed but those
        named in `copy_now`, which are copied before the return.
        patience_s: how long to wait for the share before this one, which still uses the buffer (None:
        as long as it takes); if it isn't written by then, this share is given up and reported so.
        frozen: the digest of frozen parameters that are not among the tensors.
        """
        begin = time.perf_counter()
        names = digest_of_names(tensors)
        outcome = ShareWritten(step, rank, world_size, generation, scalars=dict(scalars), frozen=frozen, names=names)
        if not self._buffer_is_free(patience_s):
            problem = f"the checkpoint before is still being written to {self.root}; it is too slow for this cadence"
            self._report(replace(outcome, error=problem, stalled_s=time.perf_counter() - begin))
            return
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
        share = {name: tensors[name].detach() for name in partition(sizes, world_size)[rank]}
        try:
            files = _lay_out(sizes, share, rank, world_size, step)
        except ValueError as error:
            self._report(replace(outcome, error=str(error)))
            return
        views = self._views(files, share)
        versions = {n: t._version for n, t in share.items()}
        copied_now = set(share) if self._copy_at_once else {n for n in share if n in copy_now}
        _copy(views, share, copied_now)
        ready = _computed(share)
        self._hurry.clear()
        interval_s = begin - self._began if self._began else math.inf
        self._duty = _duty(self._worked_s or sum(file.layout.size for file in files) / _SPEED, interval_s)
        self._began = begin
        self._copies = [
            self._copier.submit(self._copy_file, views, share, names, versions, ready)
            for names in ([n for n in file.tensors if n not in copied_now] for file in files)
        ]
        self._stalled_s = time.perf_counter() - begin
        self._writing = self._writers.submit(self._write_files, files, self._copies, outcome, begin)

    def wait_for_copy(self) -> None:
        """Return once the tensors of the last `write` may be changed."""
        if not self._copies:
            return
        begin = time.perf_counter()
        for copy in self._copies:
            with contextlib.suppress(Exception):  # the outcome reports it
                if (arrived := copy.result()) is not None:
                    torch.cuda.current_stream().wait_event(arrived)
        self._copies = []
        self._stalled_s += time.perf_counter() - begin

    def wait_until_written(self) -> None:
        """Return once the last share is on disk or S3, or has failed, which its outcome says."""
        self._hurry.set()
        self.wait_for_copy()
        if self._writing is not None:
            self._writing.result()

    def _buffer_is_free(self, patience_s: float | None) -> bool:
        self.wait_for_copy()
        self._hurry.set()
        if self._writing is not None:
            try:
                self._writing.result(patience_s)
            except TimeoutError:
                return False
        return True

    def _views(self, files: list[_File], share: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For each name a tensor over its place in the buffer; the files' headers are written there."""
        size = files[-1].offset + files[-1].layout.size if files else 0
        if self._buffer.numel() < size:
            pinned = any(t.is_cuda for t in share.values())
            self._buffer = torch.empty(0, dtype=torch.uint8)  # free the old one first
            memory = torch.empty(size + BLOCK, dtype=torch.uint8, pin_memory=pinned)
            first = -memory.data_ptr() % BLOCK  # so that the disk can read from it directly
            self._buffer = memory[first : first + size]
        views = {}
        for file in files:
            header = torch.frombuffer(bytearray(file.layout.header), dtype=torch.uint8)
            self._buffer[file.offset : file.offset + len(header)] = header
            for name, (start, stop) in zip(file.tensors, file.layout.spans.values(), strict=True):
                if stop > start:
                    flat = self._buffer[file.offset + start : file.offset + stop]
                    views[name] = flat.view(share[name].dtype).view(share[name].shape)
        return views

    def _copy_file(
        self,
        views: Mapping[str, Tensor],
        share: Mapping[str, Tensor],
        names: list[str],
        versions: Mapping[str, int],
        ready: Any,
    ) -> Any:
        """Copy the tensors of one file; on a GPU, returns the event of their arrival."""
        arrived = None
        if ready is None:
            _copy(views, share, names)
        else:
            stream = torch.cuda.Stream()
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                _copy(views, share, names, non_blocking=True)
                arrived = stream.record_event()
        changed = [n for n in names if share[n]._version != versions[n]]
        if changed:
            self._copy_at_once = True
            raise _ChangedDuringCopy(
                f"{changed[0]} was changed while it was copied; the next checkpoint copies at once"
            )
        return arrived

    def _write_files(self, files: list[_File], copies: list[Future[Any]], outcome: ShareWritten, begin: float) -> None:
        """Hash and write each file once it is copied; then report. Runs in a thread."""
        written: tuple[FileWritten, ...] = ()
        problem = None
        uploads: list[Future[None]] = []
        try:
            memory = self._buffer.numpy().data
            store = open_store(step_dir(self.root, outcome.step))
            contents = [memory[file.offset : file.offset + file.layout.size] for file in files]
            writing, *hashing = self._paces(len(files), sum(len(content) for content in contents))
            digests = []
            for file, content, copy, pace in zip(files, contents, copies, hashing, strict=True):
                if (arrived := copy.result()) is not None:
                    arrived.synchronize()
                digests.append(self._writers.submit(_digests, content, pace))
                if isinstance(self.root, Path):  # a disk gains nothing by two files at a time
                    store.upload(content, file.name, writing)
                else:
                    uploads.append(self._uploaders.submit(store.upload, content, file.name))
            for upload in uploads:
                upload.result()
            written = tuple(
                FileWritten(file.name, len(content), *digest.result())
                for file, content, digest in zip(files, contents, digests, strict=True)
            )
            self._worked_s = sum(pace.worked_s for pace in (writing, *hashing) if pace is not None)
        except Exception as error:  # whatever went wrong, the controller waits for the outcome
            known = isinstance(error, StoreError | _ChangedDuringCopy)
            problem = str(error) if known else f"{type(error).__name__}: {error}"
        wait(uploads)  # the buffer must not be used again while one is still under way
        stalled, took = self._stalled_s, time.perf_counter() - begin
        self._report(replace(outcome, files=written, error=problem, stalled_s=stalled, took_s=took))

    def _paces(self, num_files: int, size: int) -> "list[_Pace | None]":
        """The pace of the thread that writes, then of the thread that hashes each file; None: as fast as it goes."""
        if size < _SMALL or not isinstance(self.root, Path):  # on S3 the network sets the pace
            return [None] * (1 + num_files)
        # The thread that writes gets half: it has all files to write, one after the other.
        half = self._duty / 2
        return [_Pace(half, self._hurry), *(_Pace(half / num_files, self._hurry) for _ in range(num_files))]


class _Pace:
    """Called after each piece of work: rests in proportion to the time of that work, unless `hurry` is set."""

    def __init__(self, duty: float, hurry: threading.Event) -> None:
        self._rest, self._hurry = 1.0 / duty - 1.0, hurry
        self._since = time.perf_counter()
        self.worked_s = 0.0

    def __call__(self, _: int) -> None:
        took = time.perf_counter() - self._since
        self.worked_s += took
        self._hurry.wait(min(_LONGEST_REST_S, self._rest * took))
        self._since = time.perf_counter()


class _ChangedDuringCopy(RuntimeError):
    pass


def _duty(work_s: float, interval_s: float) -> float:
    """The part of a core for writing a share that takes `work_s` of one, where shares are `interval_s` apart."""
    return min(1.0, max(_DUTY, work_s / min(_LONGEST_S, _OF_INTERVAL * interval_s)))


def _lay_out(
    sizes: Mapping[str, int], share: Mapping[str, Tensor], rank: int, world_size: int, step: int
) -> list[_File]:
    """The files of this rank's share, those of model, optimizer and ema apart. sizes: bytes of all ranks' tensors.

    A large share becomes several files: one core hashes one file, and in a restore with more
    ranks each has files to read.
    """
    files, offset = [], 0
    for group in sorted({n.partition("/")[0] for n in share}):
        # All ranks come to the same number of files, since all of them know all sizes.
        size = sum(s for n, s in sizes.items() if n.startswith(group + "/"))
        num_files = max(1, min(_MOST_FILES, -(-size // (world_size * _FILE_BYTES))))
        of_group = {n.partition("/")[2]: t for n, t in share.items() if n.startswith(group + "/")}
        parts = partition({n: t.numel() * t.element_size() for n, t in of_group.items()}, num_files)
        for index, names in enumerate(parts):
            if names:
                made = layout({n: of_group[n] for n in names}, {"format": "pt", "step": str(step)})
                files.append(_File(file_name(group, rank * num_files + index, world_size * num_files), offset, made))
                offset += -(-made.size // BLOCK) * BLOCK
    return files


def _copy(
    views: Mapping[str, Tensor], share: Mapping[str, Tensor], names: Collection[str], *, non_blocking: bool = False
) -> None:
    with torch.no_grad():
        for name in names:
            if name in views:
                views[name].copy_(share[name], non_blocking=non_blocking)


def _computed(share: Mapping[str, Tensor]) -> Any:
    """On a GPU, the event at which everything that was launched so far has been computed; else None."""
    if any(t.is_cuda for t in share.values()):
        return torch.cuda.current_stream().record_event()
    return None


def _digests(content: memoryview, pace: Callable[[int], None] | None) -> list[str]:
    """The hashes of a file, in the order of DIGESTS."""
    digests = [make() for make in DIGESTS.values()]
    for start in range(0, len(content), _PIECE):
        for digest in digests:
            digest.update(content[start : start + _PIECE])
        if pace is not None:
            pace(_PIECE)
    return [digest.hexdigest() for digest in digests]


def _lower_priority() -> None:
    """Leave the cores to the training's thread; Linux has priorities per thread."""
    with contextlib.suppress(OSError, AttributeError):
        me = threading.get_native_id()  # Ray's workers have a lower priority already, by 15 of 19
        os.setpriority(os.PRIO_PROCESS, me, min(19, os.getpriority(os.PRIO_PROCESS, me) + _NICE))
