"""A pool of decoding processes that write pixels into memory shared with this one."""

import contextlib
import json
import mmap
import os
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from descent.data.pictures import Files, Form, Item, Pixels, decode_all, request
from descent.errors import DataError

_LEAST = 8  # images in a request
_SHARED = "/dev/shm"
Bad = list[tuple[int, str]]


class Decoder:
    """Decodes batches of images, with `processes` of its own or, with 0, here.

    Several threads may read at the same time, each a batch: while one waits for its last
    images or makes a batch of them, the processes go on with the next one's.
    """

    def __init__(self, form: Form, processes: int) -> None:
        self.form = form
        self._processes = processes
        self._files = Files()
        self._free: queue.Queue[subprocess.Popen[str]] = queue.Queue()
        self._threads: ThreadPoolExecutor | None = None
        self._areas: list[_Area] = []
        self._lock = threading.Lock()

    def read(self, items: list[Item]) -> tuple[Pixels, Bad]:
        """Pixels [n, channels, height, width], and (place, what is wrong) of the bad ones.

        Raises DataError when a decoding process died.
        """
        shape = (len(items), *self.form.shape)
        if self._processes == 0:
            out = np.empty(shape, dtype=np.uint8)
            return out, decode_all(items, self.form, out, self._files)
        with self._lock:
            if self._threads is None:
                self._threads = self._start()
        size = int(np.prod(shape))
        area = self._area(size)
        step = max(_LEAST, -(-len(items) // (2 * self._processes)))
        asked = [
            self._threads.submit(self._ask, area, first, items[first : first + step])
            for first in range(0, len(items), step)
        ]
        bad = [found for future in asked for found in future.result()]
        out = np.frombuffer(area.memory, dtype=np.uint8, count=size).reshape(shape).copy()
        self._areas.append(area)
        return out, bad

    def _start(self) -> ThreadPoolExecutor:
        root = str(Path(__file__).resolve().parents[2])
        for _ in range(self._processes):
            child = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"import sys; sys.path.insert(0, {root!r}); from descent.data.pictures import _serve; _serve()",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            weakref.finalize(self, _end, child)
            self._free.put(child)
        return ThreadPoolExecutor(self._processes, "decode")

    def _area(self, size: int) -> "_Area":
        with self._lock:
            while self._areas:
                area = self._areas.pop()
                if area.size >= size:
                    return area
        return _Area(size)

    def _ask(self, area: "_Area", first: int, items: list[Item]) -> Bad:
        child = self._free.get()
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(request(area.path, area.size, first, items, self.form))
            child.stdin.flush()
            answer = child.stdout.readline()
        except OSError:
            answer = ""
        finally:
            self._free.put(child)
        if not answer:
            raise DataError(
                f"a decoding process (pid {child.pid}) died; is there memory enough? data.processes=0 decodes without"
            )
        return [(first + place, why) for place, why in json.loads(answer)]


class _Area:
    """A file in memory, mapped here and by the decoding processes."""

    def __init__(self, size: int) -> None:
        self.size = size
        try:
            self._file = _reserved(_SHARED, size)
        except OSError:  # containers give it 64 MB: there, a file that stays in the page cache
            self._file = _reserved(None, size)
        self.path = self._file.name
        self.memory = mmap.mmap(self._file.fileno(), size)


def _reserved(folder: str | None, size: int) -> "tempfile._TemporaryFileWrapper[bytes]":
    """A file of `size` bytes, known by name to the decoding processes, deleted when it is let go."""
    file = tempfile.NamedTemporaryFile(dir=folder, prefix="descent-")  # noqa: SIM115
    # without the room, a write into the mapping would be a SIGBUS
    os.posix_fallocate(file.fileno(), 0, size)
    return file


def _end(child: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(OSError):
        if child.stdin is not None:
            child.stdin.close()
    child.kill()
    child.wait()
