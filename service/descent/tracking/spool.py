"""A durable queue of JSON records in one directory: what has still to be delivered to the tracking server.

    records.jsonl   one record a line, appended by any thread; a line is a record once its
                    newline is there
    acknowledged    how many of those bytes have been delivered, as a decimal number
    files/          what a record refers to by name: plots, tables, the model
    refused.jsonl   records that the server will never accept, each with its reason

A record survives the death of the process as soon as `append` has returned (it is in the
kernel's hands), and that of the machine once `sync` has run. Reading is at-least-once: after
a crash between delivery and `acknowledge`, a record is read again, so that delivering it must
be idempotent.
"""

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from descent.storage.atomic import PRIVATE, write_atomic

# Below this there is nothing to gain from reusing the file's space.
REUSE_BYTES = 16 * 2**20


class SpoolBusyError(Exception):
    """Another living process uses this spool."""


class Spool:
    """The queue in `directory`, held exclusively by this object until `close`.

    Raises `SpoolBusyError` if another process (or object) holds it, OSError if the
    directory can't be written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = directory / "files"
        self.refused = directory / "refused.jsonl"
        self.files.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._fd = os.open(directory / "records.jsonl", os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise SpoolBusyError(f"{directory} is in use by another process") from None
        self._size = self._drop_torn_line()
        self._acknowledged = self._load_acknowledged()
        self._synced = 0
        self._next_file = max((int(n) for n in os.listdir(self.files) if n.isdigit()), default=0) + 1
        self._appended = 0
        self._found = self.pending()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record (anything that JSON can hold); raises OSError when the disk is full."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                written = os.write(self._fd, line)
                if written != len(line):
                    raise OSError(f"disk full: {self.directory}")
            except OSError:
                # half a line would swallow the next record
                os.ftruncate(self._fd, self._size)
                raise
            self._size += len(line)
            self._appended += 1

    def read(self, max_bytes: int = 2**16) -> list[tuple[int, dict[str, Any] | None]]:
        """The oldest records that aren't acknowledged: (offset after the record, record).

        None stands for a line that isn't a JSON object (damaged on disk): to be skipped.
        """
        with self._lock:
            start, end = self._acknowledged, self._size
        chunk = os.pread(self._fd, min(end - start, max_bytes), start)
        if chunk and b"\n" not in chunk:  # one record larger than max_bytes
            chunk = os.pread(self._fd, end - start, start)
        records: list[tuple[int, dict[str, Any] | None]] = []
        position = 0
        while (newline := chunk.find(b"\n", position)) >= 0:
            records.append((start + newline + 1, _parse(chunk[position:newline])))
            position = newline + 1
        return records

    def acknowledge(self, offset: int) -> None:
        """Everything before `offset` has been delivered and is never read again."""
        with self._lock:
            assert self._acknowledged <= offset <= self._size, (offset, self._size)
            if offset == self._size > REUSE_BYTES:
                # Truncate first: a crash in between leaves a mark beyond the end, which
                # `_load_acknowledged` recognises.
                os.ftruncate(self._fd, 0)
                self._size = offset = 0
                self._synced = 0
            self._acknowledged = offset
            # Not synced: if a loss of power undoes the mark, records are delivered again, which is harmless.
            write_atomic(self.directory / "acknowledged", str(offset), mode=PRIVATE, durable=False)

    @property
    def total(self) -> int:
        """Records found undelivered at the start plus those appended since."""
        with self._lock:
            return self._found + self._appended

    @property
    def pending_bytes(self) -> int:
        """Bytes of records that aren't acknowledged."""
        with self._lock:
            return self._size - self._acknowledged

    def pending(self) -> int:
        """How many records aren't acknowledged; reads them all."""
        with self._lock:
            start, end = self._acknowledged, self._size
        count = 0
        while start < end:
            chunk = os.pread(self._fd, min(end - start, 2**20), start)
            if not chunk:
                break
            count += chunk.count(b"\n")
            start += len(chunk)
        return count

    def keep_file(self, source: Path, *, move: bool = False) -> str:
        """Copy (or move) a file or directory into the spool; returns its name in `files/`."""
        with self._lock:
            number, self._next_file = self._next_file, self._next_file + 1
        name = f"{number:06d}"
        target = self.files / name / source.name
        target.parent.mkdir()
        if move:
            shutil.move(source, target)
        elif source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy2(source, target)
        return f"{name}/{source.name}"

    def drop_file(self, name: str) -> None:
        """Remove what `keep_file` kept, after its delivery."""
        shutil.rmtree(self.files / name.split("/")[0], ignore_errors=True)

    def refuse(self, record: Mapping[str, Any], reason: str) -> None:
        """Put a record aside that the server will never accept."""
        with open(self.refused, "a") as file:
            file.write(json.dumps({"reason": reason, "record": record}) + "\n")

    def sync(self) -> None:
        """Make all appended records survive the loss of the machine; costs a disk flush."""
        with self._lock:
            size = self._size
        if size != self._synced:
            os.fdatasync(self._fd)
            self._synced = size

    def close(self) -> None:
        """Give the spool up for the next holder; idempotent."""
        if self._fd >= 0:
            self.sync()
            os.close(self._fd)
            self._fd = -1

    def delete(self) -> None:
        """Close the spool and remove its directory."""
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _drop_torn_line(self) -> int:
        """Cut off what follows the last newline; returns the size."""
        size = os.fstat(self._fd).st_size
        end = size
        while end > 0:
            start = max(0, end - 2**16)
            newline = os.pread(self._fd, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end != size:
            os.ftruncate(self._fd, end)
        return end

    def _load_acknowledged(self) -> int:
        try:
            offset = int((self.directory / "acknowledged").read_text())
        except (FileNotFoundError, ValueError):
            # Without a mark everything is delivered again, which is idempotent.
            return 0
        return offset if 0 <= offset <= self._size else 0


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
