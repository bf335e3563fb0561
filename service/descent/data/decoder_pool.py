"""A pool of decoding processes that write pixels into memory which they share with this process."""

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

from descent.data.image_decoding import FileReader, ImageForm, Item, Pixels, decode_all, request
from descent.errors import DataError

_LEAST = 8  # images in a request, at least
_SHARED_MEMORY = "/dev/shm"
Bad = list[tuple[int, str]]
"""(place in the batch, what is wrong) of each image that can't be decoded."""


class DecoderPool:
    """Decodes batches of images in `processes` processes; with 0, in the calling thread.

    Several threads may read a batch each at the same time: while one thread waits for its last images,
    or makes a batch of them, the processes decode the next thread's images.
    """

    def __init__(self, form: ImageForm, processes: int) -> None:
        self.form = form
        self._processes = processes
        self._files = threading.local()
        self._idle: queue.Queue[subprocess.Popen[str]] = queue.Queue()
        self._threads: ThreadPoolExecutor | None = None
        self._areas: list[_Area] = []
        self._lock = threading.Lock()

    def read(self, items: list[Item]) -> tuple[Pixels, Bad]:
        """Pixels [n, channels, height, width], and the images that can't be decoded.

        Raises DataError when a decoding process has died.
        """
        shape = (len(items), *self.form.shape)
        if self._processes == 0:
            out = np.empty(shape, dtype=np.uint8)
            if not hasattr(self._files, "reader"):
                self._files.reader = FileReader()
            return out, decode_all(items, self.form, out, self._files.reader)
        with self._lock:
            if self._threads is None:
                self._threads = self._start()
        size = int(np.prod(shape))
        area = self._area(size)
        step = max(_LEAST, -(-len(items) // (2 * self._processes)))
        requests = [
            self._threads.submit(self._request, area, first, items[first : first + step])
            for first in range(0, len(items), step)
        ]
        bad = [found for future in requests for found in future.result()]
        out = np.frombuffer(area.memory, dtype=np.uint8, count=size).reshape(shape).copy()
        self._areas.append(area)
        return out, bad

    def _start(self) -> ThreadPoolExecutor:
        root = str(Path(__file__).resolve().parents[2])
        for _ in range(self._processes):
            child = subprocess.Popen(
                [
                    sys.executable,
                    "-P",  # no module of the current folder in place of a library's
                    "-c",
                    f"import sys; sys.path.insert(0, {root!r}); from descent.data.image_decoding import serve; serve()",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            weakref.finalize(self, _end, child)
            self._idle.put(child)
        return ThreadPoolExecutor(self._processes, "decode")

    def _area(self, size: int) -> "_Area":
        with self._lock:
            while self._areas:
                area = self._areas.pop()
                if area.size >= size:
                    return area
        return _Area(size)

    def _request(self, area: "_Area", first: int, items: list[Item]) -> Bad:
        """Let one process decode `items` to sample `first` of the area and after."""
        child = self._idle.get()
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(request(area.path, area.size, first, items, self.form))
            child.stdin.flush()
            answer = child.stdout.readline()
        except OSError:
            answer = ""
        finally:
            self._idle.put(child)
        if not answer:
            raise DataError(
                f"a decoding process (pid {child.pid}) died; is there memory enough? data.processes=0 decodes without"
            )
        return [(first + place, why) for place, why in json.loads(answer)]


class _Area:
    """A file in memory that this process and the decoding processes map."""

    def __init__(self, size: int) -> None:
        self.size = size
        try:
            self._file = _reserved(_SHARED_MEMORY, size)
        except (
            OSError
        ):  # containers often allow 64 MB of shared memory: then a file on disk, which stays in the page cache
            self._file = _reserved(None, size)
        self.path = self._file.name
        self.memory = mmap.mmap(self._file.fileno(), size)


def _reserved(folder: str | None, size: int) -> "tempfile._TemporaryFileWrapper[bytes]":
    """A file of `size` bytes, which the decoding processes open by its name; deleted with the object."""
    file = tempfile.NamedTemporaryFile(dir=folder, prefix="descent-")  # noqa: SIM115
    # Without reserved room, a write into the mapping could end in a SIGBUS.
    os.posix_fallocate(file.fileno(), 0, size)
    return file


def _end(child: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(OSError):
        if child.stdin is not None:
            child.stdin.close()
    child.kill()
    child.wait()
