"""Saving and restoring a checkpoint of 300 MB against the raw disk and against plain boto3.

On disk: `ShareWriter` (copy, hash, write, fsync) and its manifest against `dd … conv=fsync` of as many
bytes from memory; `load` (read, hash, parse) against `dd` to /dev/null, the page cache dropped
before each. On S3: the same write and read against boto3's `upload_file` and `download_file`, on
the same server (moto's, in a process of its own, on loopback). Which of the two goes first changes
from pair to pair, since the second finds the disk's queue or the server's memory as the first has
left it. The ratio is of bandwidths.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from descent.checkpoint.manifest import commit_checkpoint
from descent.checkpoint.reader import read_checkpoint
from descent.checkpoint.retention import delete
from descent.checkpoint.writer import ShareWriter
from descent.messages import ShareWritten
from descent.storage import Location, open_store, to_location
from tests.bench.measure import BenchError, Result, result_of, worst

_MB = 300
_PAIRS = 10
"""Many, since what else is on the disk's host shows in each; even, so that each side is first as often as second."""
_TARGETS = {"store_disk": 0.9, "store_s3": 0.95}


def run() -> list[Result]:
    """One result per direction and kind of store, and the worst as `store`."""
    tensors = {
        f"{group}/{i}": torch.randn(25_000_000 // 8, dtype=torch.float32)
        for group, count in (("model", 8), ("optimizer", 16))
        for i in range(count)
    }
    results = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        source = Path(memory) / "bytes"
        source.write_bytes(os.urandom(1 << 20) * _MB)
        results += _on_disk(Path(folder), source, tensors)
        results += _on_s3(Path(folder), source, tensors)
    return [*results, worst("store", results)]


def _on_disk(folder: Path, source: Path, tensors: dict[str, torch.Tensor]) -> list[Result]:
    raw = folder / "raw"
    writer, shares = _writer(folder / "checkpoints")
    saves, loads = [], []
    for pair in range(_PAIRS + 1):  # the first warms buffers and disk up
        raw.unlink(missing_ok=True)
        target: list[Location] = []
        saves.append(
            _rates(
                lambda: target.append(_write(writer, shares, tensors)),  # noqa: B023
                lambda: _dd(f"if={source}", f"of={raw}", "conv=fsync"),
                swap=pair % 2 == 1,
            )
        )
        _drop([raw, *Path(str(target[0])).iterdir()])
        loads.append(
            _rates(
                lambda: read_checkpoint(target[0]),  # noqa: B023
                lambda: _dd(f"if={raw}", "of=/dev/null"),
                swap=pair % 2 == 1,
            )
        )
        delete(target[0])
    goal = _TARGETS["store_disk"]
    return [
        result_of("store_disk_save", saves[1:], goal, "higher", unit="MB/s"),
        result_of("store_disk_restore", loads[1:], goal, "higher", unit="MB/s"),
    ]


def _on_s3(folder: Path, source: Path, tensors: dict[str, torch.Tensor]) -> list[Result]:
    from tests.storage.servers import moto

    with moto() as server, mock.patch.dict(os.environ, server.environment()):
        client = server.client()
        client.create_bucket(Bucket="bench")
        writer, shares = _writer(to_location("s3://bench/run"))
        bucket = open_store(to_location("s3://bench"))

        def upload() -> None:
            client.upload_file(str(source), "bench", "raw")

        saves, loads = [], []
        for pair in range(_PAIRS + 1):
            saves.append(
                _rates(
                    lambda: _write(writer, shares, tensors),
                    upload,
                    swap=pair % 2 == 1,
                    tidy=lambda: bucket.delete([entry.key for entry in bucket.list()]),
                )
            )
        target = _write(writer, shares, tensors)
        upload()
        for pair in range(_PAIRS + 1):
            loads.append(
                _rates(
                    lambda: read_checkpoint(target),
                    lambda: client.download_file("bench", "raw", str(folder / "back")),
                    swap=pair % 2 == 1,
                )
            )
    goal = _TARGETS["store_s3"]
    return [
        result_of("store_s3_save", saves[1:], goal, "higher", unit="MB/s"),
        result_of("store_s3_restore", loads[1:], goal, "higher", unit="MB/s"),
    ]


def _writer(root: Location) -> tuple[ShareWriter, list[ShareWritten]]:
    shares: list[ShareWritten] = []
    return ShareWriter(root, shares.append), shares


def _write(writer: ShareWriter, shares: list[ShareWritten], tensors: dict[str, torch.Tensor]) -> Location:
    shares.clear()
    writer.write(tensors, step=1, rank=0, world_size=1, generation=1, scalars={})
    writer.wait_until_written()
    if shares[0].error:
        raise BenchError(shares[0].error)
    return commit_checkpoint(writer.root, shares, run="bench", config_sha256="")


def _rates(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    swap: bool,
    tidy: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """MB a second of both; theirs goes first if `swap`, and each leaves to `tidy` what it wrote."""
    rates = {}
    for work in (theirs, ours) if swap else (ours, theirs):
        rates[work] = _MB / _seconds(work)
        tidy()
    return rates[ours], rates[theirs]


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _dd(*arguments: str) -> None:
    done = subprocess.run(["dd", *arguments, "bs=4M"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(done.stderr)


def _drop(files: list[Path]) -> None:
    """Take files out of the page cache; what is not on disk yet would stay in it."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
