"""Writing large files past the page cache: no copy of the bytes, no storm of dirty pages afterwards.

What a checkpoint writes is read again only after a fault, so a copy of it in the page cache
helps nobody: it costs the copy, pushes out what training does read, and is written back by the
kernel in bursts that take the processor and the disk from the step beside it.
"""

import errno
import fcntl
import os

import numpy as np

from descent.storage.base import Content, Progress

BLOCK = 4096
"""Direct I/O moves whole blocks, from memory that begins at one."""
_LEAST = 1 << 20
_PIECE = 8 << 20


def write_direct(descriptor: int, content: Content, progress: Progress | None) -> int:
    """Write as much of `content` as goes directly from memory to disk; how many bytes that was.

    0 for what is small or begins within a block, and where the file system can't do it. The
    rest, usually less than a block, is for the caller to write.
    """
    view = memoryview(content).cast("B")
    whole = view.nbytes // BLOCK * BLOCK
    if whole < _LEAST or _address(view) % BLOCK or not hasattr(os, "O_DIRECT"):
        return 0
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    done = 0
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        while done < whole:
            moved = os.write(descriptor, view[done : min(done + _PIECE, whole)])
            done += moved
            if progress is not None:
                progress(moved)
    except OSError as error:
        # memory file systems and some on a network refuse; after a write that was cut short all do
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return done


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, dtype=np.uint8).ctypes.data
    return address
