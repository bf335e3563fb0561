"""A rank's share of a checkpoint, written behind the training's back.

    save()   lays the files out in a buffer that is used again for each save, and returns
    copier   a thread copies the tensors into it, file after file, while the next step computes
             its gradients; `copied()`, called before whatever changes them, waits for the rest
    writer   threads hash and write each file as soon as it is copied, to disk (taking their
             time while nobody waits) or S3

Copying, hashing and writing are calls into C that release the interpreter's lock, so no
process of its own is needed for them; what isn't paced is niced, to leave the cores to the step.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from descent.checkpoint.manifest import DIGESTS, file_name, share, step_dir
from descent.checkpoint.safetensors_file import Layout, layout
from descent.errors import StoreError
from descent.messages import FileWritten, ShareWritten
from descent.storage import Location, open_store
from descent.storage.direct_io import BLOCK

_NICE = 10
_DUTY = 0.03
"""The part of a core that writing to disk takes while nobody waits for it: memory and caches are shared."""
_OF_INTERVAL = 0.5
"""A save takes at most about this part of the time between two: the next one needs its buffer."""
_LONGEST_S = 120.0
"""And at most about this long, where a core can do it: until it is done it is of no use."""
_SPEED = 1e9
"""Bytes a second of one core, until a save has shown it."""
_LITTLE = 16 << 20
"""Bytes that are not worth taking time over."""
_PIECE = 4 << 20
_FILE_BYTES = 64 << 20
_MOST_FILES = 4
"""Of a group, a rank writes about one file for so many bytes, and at most so many files."""
_AT_ONCE = 3
"""Files under way to S3, each with its own parts: a server that puts one together has another's parts to take meanwhile."""
_LONGEST_REST_S = 1.0

_File = tuple[str, int, Layout]
"""Its name, where it begins in the buffer, and its layout."""


class ShareWriter:
    """Writes this rank's share; one save at a time, from one buffer."""

    def __init__(self, root: Location, done: Callable[[ShareWritten], None]) -> None:
        self.root = root
        self._done = done
        self._copier = ThreadPoolExecutor(1, "copier")  # an update may be waiting for it
        # A save, and its files' hashes in turn. On disk they pace themselves until somebody waits, and then
        # nothing is to hold them back: a thread can't take back having stepped back.
        paced = isinstance(root, Path)
        self._writer = ThreadPoolExecutor(8, "writer", initializer=None if paced else _step_back)
        self._uploader = ThreadPoolExecutor(_AT_ONCE, "uploader", initializer=_step_back)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._copies: list[Future[Any]] = []
        """One a file, in their order."""
        self._write: Future[None] | None = None
        self._hurry = threading.Event()
        """Somebody waits for the write."""
        self._torn = False
        """A tensor was changed while it was copied, by something that didn't ask: copy at once from now on."""
        self._stalled_s = 0.0
        self._began = 0.0
        self._duty = _DUTY
        self._worked_s = 0.0
        """What the last save took of a core."""

    def save(
        self,
        tensors: Mapping[str, Tensor],
        *,
        step: int,
        rank: int,
        world_size: int,
        generation: int,
        scalars: Mapping[str, float],
        now: Collection[str] = (),
        patience_s: float | None = None,
    ) -> None:
        """Take this rank's share of the tensors ("model/…", "optimizer/…", "ema/…") and write it.

        Returns before it is copied: call `copied()` before any tensor is changed but those named
        in `now`, which are copied at once.
        patience_s: how long to wait for the last save, whose buffer is still in use; when it
        is not done by then, this one is given up and says so.
        """
        begin = time.perf_counter()
        part = ShareWritten(step, rank, world_size, generation, scalars=dict(scalars))
        if not self._free(patience_s):
            wrong = f"the checkpoint before is still being written to {self.root}; it is too slow for this cadence"
            self._done(replace(part, error=wrong, stalled_s=time.perf_counter() - begin))
            return
        mine = {n: tensors[n].detach() for n in share(tensors, rank, world_size)}
        try:
            files = _lay_out(tensors, mine, rank, world_size, step)
        except ValueError as error:
            self._done(replace(part, error=str(error)))
            return
        views = self._views(files, mine)
        versions = {n: t._version for n, t in mine.items()}
        at_once = set(mine) if self._torn else {n for n in mine if n in now}
        _copy(views, mine, at_once)
        ready = _mark(mine)
        self._hurry.clear()
        size = sum(found.size for _, _, found in files)
        interval_s = begin - self._began if self._began else math.inf
        self._duty = _duty(self._worked_s or size / _SPEED, interval_s)
        self._began = begin
        self._copies = [
            self._copier.submit(self._copy_file, views, mine, names, versions, ready)
            for names in ([n for n in _names_in(file) if n not in at_once] for file in files)
        ]
        self._stalled_s = time.perf_counter() - begin
        self._write = self._writer.submit(self._finish, files, self._copies, part, begin)

    def copied(self) -> None:
        """Wait until the tensors of the last save may be changed."""
        if not self._copies:
            return
        begin = time.perf_counter()
        for copy in self._copies:
            with contextlib.suppress(Exception):  # what went wrong, the part tells
                if (arrived := copy.result()) is not None:
                    torch.cuda.current_stream().wait_event(arrived)
        self._copies = []
        self._stalled_s += time.perf_counter() - begin

    def wait(self) -> None:
        """Until the last save is on disk (or has failed, which its part says)."""
        self._hurry.set()
        self.copied()
        if self._write is not None:
            self._write.result()

    def _free(self, patience_s: float | None) -> bool:
        self.copied()
        self._hurry.set()
        if self._write is not None:
            try:
                self._write.result(patience_s)
            except TimeoutError:
                return False
        return True

    def _paces(self, files: int, size: int) -> "list[_Pace] | None":
        """For the thread that writes and for each that hashes; on S3 the network sets the pace."""
        if size < _LITTLE or not isinstance(self.root, Path):
            return None
        # Half for the one that writes: it has all files to write, one after the other.
        half = self._duty / 2
        return [_Pace(half, self._hurry), *(_Pace(half / files, self._hurry) for _ in range(files))]

    def _views(self, files: list[_File], mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A tensor over its place in the buffer for each name; the headers are written."""
        size = files[-1][1] + files[-1][2].size if files else 0
        if self._buffer.numel() < size:
            pinned = any(t.is_cuda for t in mine.values())
            self._buffer = torch.empty(0, dtype=torch.uint8)  # free the old one first
            room = torch.empty(size + BLOCK, dtype=torch.uint8, pin_memory=pinned)
            first = -room.data_ptr() % BLOCK  # so that the disk can read from it directly
            self._buffer = room[first : first + size]
        views = {}
        for file in files:
            _, at, found = file
            header = torch.frombuffer(bytearray(found.header), dtype=torch.uint8)
            self._buffer[at : at + len(found.header)] = header
            for name, (start, stop) in zip(_names_in(file), found.spans.values(), strict=True):
                if stop > start:
                    flat = self._buffer[at + start : at + stop]
                    views[name] = flat.view(mine[name].dtype).view(mine[name].shape)
        return views

    def _copy_file(
        self,
        views: Mapping[str, Tensor],
        mine: Mapping[str, Tensor],
        names: list[str],
        versions: Mapping[str, int],
        ready: Any,
    ) -> Any:
        """Copy the tensors of one file; on a GPU, the moment at which they will have arrived."""
        arrived = None
        if ready is None:
            _copy(views, mine, names)
        else:
            stream = torch.cuda.Stream()
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                _copy(views, mine, names, non_blocking=True)
                arrived = stream.record_event()
        changed = [n for n in names if mine[n]._version != versions[n]]
        if changed:
            self._torn = True
            raise _Torn(f"{changed[0]} was changed while it was copied; the next save copies at once")
        return arrived

    def _finish(self, files: list[_File], copies: list[Future[Any]], part: ShareWritten, begin: float) -> None:
        written: tuple[FileWritten, ...] = ()
        problem = None
        uploads: list[Future[None]] = []
        try:
            memory = self._buffer.numpy().data
            store = open_store(step_dir(self.root, part.step))
            contents = [(name, memory[at : at + found.size]) for name, at, found in files]
            paces = self._paces(len(files), sum(len(content) for _, content in contents))
            digests = []
            for i, ((name, content), copy) in enumerate(zip(contents, copies, strict=True)):
                if (arrived := copy.result()) is not None:
                    arrived.synchronize()
                pace = paces[1 + i] if paces else None
                digests.append(self._writer.submit(_digests, content, pace))
                if isinstance(self.root, Path):  # a disk gains nothing by two files at once
                    store.upload(content, name, paces[0] if paces else None)
                else:
                    uploads.append(self._uploader.submit(store.upload, content, name))
            for upload in uploads:
                upload.result()
            written = tuple(
                FileWritten(name, len(content), *digest.result())
                for (name, content), digest in zip(contents, digests, strict=True)
            )
            self._worked_s = sum(pace.worked_s for pace in paces or ())
        except Exception as error:  # whatever it is, the controller waits to hear of it
            problem = str(error) if isinstance(error, StoreError | _Torn) else f"{type(error).__name__}: {error}"
        wait(uploads)  # the buffer must not be used again while one is still under way
        stalled, took = self._stalled_s, time.perf_counter() - begin
        self._done(replace(part, files=written, error=problem, stalled_s=stalled, took_s=took))


def _names_in(file: _File) -> list[str]:
    """The tensors of a file, by their names in the state, in the order of its layout."""
    group = file[0].partition("-")[0]
    return [f"{group}/{inner}" for inner in file[2].spans]


def _digests(content: memoryview, pace: Callable[[int], None] | None) -> list[str]:
    digests = [make() for make in DIGESTS.values()]
    for at in range(0, len(content), _PIECE):
        for digest in digests:
            digest.update(content[at : at + _PIECE])
        if pace is not None:
            pace(_PIECE)
    return [digest.hexdigest() for digest in digests]


class _Pace:
    """Called after each piece of work: rests in proportion to what it took, unless somebody waits."""

    def __init__(self, share: float, hurry: threading.Event) -> None:
        self._rest, self._hurry = 1.0 / share - 1.0, hurry
        self._since = time.perf_counter()
        self.worked_s = 0.0

    def __call__(self, _: int) -> None:
        took = time.perf_counter() - self._since
        self.worked_s += took
        self._hurry.wait(min(_LONGEST_REST_S, self._rest * took))
        self._since = time.perf_counter()


def _duty(work_s: float, interval_s: float) -> float:
    """The part of a core for a save that takes `work_s` of one, where two are so far apart."""
    return min(1.0, max(_DUTY, work_s / min(_LONGEST_S, _OF_INTERVAL * interval_s)))


class _Torn(RuntimeError):
    def __str__(self) -> str:
        return str(self.args[0])


def _lay_out(
    tensors: Mapping[str, Tensor], mine: Mapping[str, Tensor], rank: int, world_size: int, step: int
) -> list[_File]:
    """This rank's files: model, optimizer and ema apart.

    A large share becomes several files: a hash runs over one file on one core, and a
    restore with more ranks has more to deal out.
    """
    found, at = [], 0
    for group in sorted({n.partition("/")[0] for n in mine}):
        # All ranks come to the same number, since all of them know all tensors.
        whole = sum(t.numel() * t.element_size() for n, t in tensors.items() if n.startswith(group + "/"))
        pieces = max(1, min(_MOST_FILES, -(-whole // (world_size * _FILE_BYTES))))
        inside = {n.partition("/")[2]: t for n, t in mine.items() if n.startswith(group + "/")}
        for piece in range(pieces):
            part = {n: inside[n] for n in share(inside, piece, pieces)}
            if not part:
                continue
            made = layout(part, {"format": "pt", "step": str(step)})
            found.append((file_name(group, rank * pieces + piece, world_size * pieces), at, made))
            at += -(-made.size // BLOCK) * BLOCK
    return found


def _copy(
    views: Mapping[str, Tensor], mine: Mapping[str, Tensor], names: Collection[str], *, non_blocking: bool = False
) -> None:
    with torch.no_grad():
        for name in names:
            if name in views:
                views[name].copy_(mine[name], non_blocking=non_blocking)


def _mark(mine: Mapping[str, Tensor]) -> Any:
    """On a GPU, the moment at which everything that was launched so far has been computed."""
    if any(t.is_cuda for t in mine.values()):
        return torch.cuda.current_stream().record_event()
    return None


def _step_back() -> None:
    """Leave the cores to the training thread; Linux has priorities per thread."""
    with contextlib.suppress(OSError, AttributeError):
        me = threading.get_native_id()  # Ray's workers have stepped back already, by 15 of 19
        os.setpriority(os.PRIO_PROCESS, me, min(19, os.getpriority(os.PRIO_PROCESS, me) + _NICE))
