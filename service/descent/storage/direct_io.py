"""Writes large files directly from memory to disk, without the kernel's page cache (O_DIRECT).

A checkpoint is read again only after a fault, so a copy of its bytes in the page cache is of no
use. That copy costs time, pushes out the data that training reads, and is written to the disk by
the kernel in bursts, which take processor and disk from the training.
"""

import errno
import fcntl
import os

import numpy as np

from descent.storage.base import Content, Progress

BLOCK = 4096
"""Direct I/O writes whole blocks of so many bytes, from memory whose address is a multiple of it."""
_LEAST = 1 << 20
_PIECE = 8 << 20


def write_direct(descriptor: int, content: Content, progress: Progress | None) -> int:
    """Write the first part of `content` directly to disk; returns how many bytes were written.

    That is all but the last, incomplete block; nothing (0) if the content is small, if its memory
    doesn't begin at a block, or if the file system has no direct I/O. The caller writes the rest.
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
        # Memory file systems and some network file systems refuse. All refuse to go on after a write
        # that was cut short within a block.
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return done


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, dtype=np.uint8).ctypes.data
    return address
