"""Files that are written past the page cache hold what was in memory, wherever that begins and ends."""

import os
from pathlib import Path

import numpy as np
import pytest

from descent.storage.direct_io import BLOCK, write_direct
from descent.storage.local import LocalStore

_MB = 1 << 20


def memory(size: int, offset: int = 0) -> memoryview:
    """Random bytes that begin `offset` after a block's beginning."""
    room = np.empty(size + 2 * BLOCK, dtype=np.uint8)
    first = -room.ctypes.data % BLOCK + offset
    room[first : first + size] = np.frombuffer(np.random.default_rng(size).bytes(size), np.uint8)
    return room[first : first + size].data


@pytest.mark.parametrize("offset", [0, 64])
@pytest.mark.parametrize("size", [0, 5, _MB - 1, _MB, _MB + 1, 8 * _MB, 20 * _MB + BLOCK + 17])
@pytest.mark.parametrize("folder", [None, "/dev/shm"])
def test_a_file_is_what_was_in_memory(tmp_path: Path, size: int, offset: int, folder: str | None):
    content, moved = memory(size, offset), list[int]()
    root = tmp_path if folder is None else Path(folder) / f"descent-test-{os.getpid()}"
    store = LocalStore(root)
    try:
        store.upload(content, "file", moved.append)
        assert (root / "file").read_bytes() == bytes(content)
        assert sum(moved) == size
    finally:
        store.delete(["file"])


def test_only_whole_blocks_from_aligned_memory_go_directly_and_the_descriptor_is_as_before(
    tmp_path: Path,
):
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        assert write_direct(descriptor, memory(2 * _MB, offset=64), None) == 0
        assert write_direct(descriptor, memory(BLOCK), None) == 0
        done = write_direct(descriptor, memory(2 * _MB + 100), None)
        assert done in (0, 2 * _MB)  # 0 where this file system has no direct I/O
        os.write(descriptor, b"tail of any length")
        assert os.fstat(descriptor).st_size == done + 18
    finally:
        os.close(descriptor)
