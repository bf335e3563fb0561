"""A node's cache of files that lie elsewhere: fetched once for all workers, verified, bounded.

A file's name in the cache is the hash of its content, so that a changed shard is another
file and two sets may share one. Locks are the kernel's (flock): those of a process that
died are gone with it. A file that is evicted while somebody has it mapped lives on until
it is unmapped.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from service.data.storage import Storage
from service.errors import DataError

_PATIENCE_S = 1800.0  # for another worker that fetches the same file
_ATTEMPTS = 3
_LOOK_S = 0.02


class NodeCache:
    """Files in `folder`, at most `max_bytes` of them."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def get(
        self, storage: Storage, name: str, size: int, sha256: str | None, key: str | None = None
    ) -> Path:
        """The local copy of a file, fetched unless it is here.

        sha256: what it must hash to; None where nobody knows (`key` then names it).
        Raises DataError when it can't be fetched, is not what the index says (after three
        attempts), or finds no room.
        """
        key = sha256 or key
        assert key is not None
        path = self.folder / f"{key}{Path(name).suffix}"
        if _touch(path):
            return path
        if size > self.max_bytes:
            raise DataError(
                f"{storage.uri}/{name} has {size} bytes, the cache holds {self.max_bytes}: "
                "give it more with data.cache.gb"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache.dir={self.folder}: can't be made: {error}") from error
        part = self.folder / f"{key}.{size}.part"  # its name says how much room it will take
        lock = self.folder / f"{key}.lock"
        with _locked(lock):
            if not _touch(path):
                self._fetch(storage, name, size, sha256, part)
                part.replace(path)
            lock.unlink(missing_ok=True)
        return path

    def _fetch(
        self, storage: Storage, name: str, size: int, sha256: str | None, part: Path
    ) -> None:
        wrong = ""
        for _ in range(_ATTEMPTS):
            try:
                self._reserve(part, size, f"{storage.uri}/{name}")
                storage.fetch(name, part)
                wrong = _difference(part, size, sha256)
            except OSError as error:
                wrong = f"can't be written to {self.folder}: {error}"
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            if not wrong:
                return
            part.unlink(missing_ok=True)
        raise DataError(f"{storage.uri}/{name}: {wrong} ({_ATTEMPTS} attempts)")

    def _reserve(self, part: Path, size: int, what: str) -> None:
        """A file of `size` bytes at `part`, so that everyone sees the room as taken."""
        with _locked(self.folder / "room.lock"):
            part.unlink(missing_ok=True)
            self._evict(self.max_bytes - size, part)
            while True:
                try:
                    with part.open("wb") as file:
                        if size:
                            os.posix_fallocate(file.fileno(), 0, size)
                    return
                except OSError as error:
                    part.unlink(missing_ok=True)
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                        raise
                    kept = sum(f.stat().st_size for f in self._whole())
                    if kept == 0:
                        raise DataError(
                            f"{what}: no room for its {size} bytes in {self.folder} ({error.strerror}); free "
                            "some, or set data.cache.dir to a larger disk"
                        ) from error
                    self._evict(max(0, kept - max(size, 1)), part)

    def _whole(self) -> list[Path]:
        return [f for f in self.folder.iterdir() if f.suffix not in (".part", ".lock")]

    def _evict(self, allowed: int, mine: Path) -> None:
        """Delete what was used longest ago until `allowed` bytes are left, and what a dead process left."""
        found = []
        for file in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if file.suffix == ".part" and file != mine and _abandoned(file):
                    file.unlink()
                elif file.suffix == ".part":
                    found.append((0, int(file.name.split(".")[1]), file))
                elif file.suffix != ".lock":
                    stat = file.stat()
                    found.append((stat.st_mtime_ns, stat.st_size, file))
        total = sum(size for _, size, _ in found)
        for _, size, file in sorted(found):
            if total <= allowed:
                return
            if file.suffix != ".part":
                file.unlink(missing_ok=True)
                total -= size


def _touch(path: Path) -> bool:
    """Whether the file is here; if so it is marked as just used."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except PermissionError:
        return path.is_file()
    return True


def _difference(file: Path, size: int, sha256: str | None) -> str:
    found = file.stat().st_size
    if found != size:
        return f"{found} bytes came, {size} were promised"
    if sha256 is None:
        return ""
    with file.open("rb") as content:
        got = hashlib.file_digest(content, "sha256").hexdigest()
    return "" if got == sha256 else f"is corrupt: its sha256 is {got[:12]}…, not {sha256[:12]}…"


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock. Raises DataError when somebody else keeps it for half an hour."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        with file.open("a") as lock:
            while not _take(lock.fileno()):
                if time.monotonic() > deadline:
                    raise DataError(
                        f"{file}: another process has held it for {_PATIENCE_S / 60:g} minutes"
                    )
                time.sleep(_LOOK_S)
            # whoever held it may have deleted the file: then this lock is nobody's
            if not _is_at(lock.fileno(), file):
                continue
            yield
            return


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _abandoned(part: Path) -> bool:
    """Whether nobody holds the lock of this unfinished file."""
    lock = part.with_name(f"{part.name.split('.')[0]}.lock")
    try:
        with lock.open("r+") as file:
            return _take(file.fileno())
    except FileNotFoundError:
        return True


_DEFAULT_BYTES = 20 * 10**9
_cache: list[NodeCache] = []


def use_cache(folder: str | None, gigabytes: float) -> None:
    """Set this process's cache; by default 20 GB in the user's cache folder."""
    place = Path(folder).expanduser() if folder else _default_folder()
    _cache[:] = [NodeCache(place, int(gigabytes * 1e9))]


def _default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "descent" / "data"


def node_cache() -> NodeCache:
    """The cache that this process uses."""
    if not _cache:
        _cache.append(NodeCache(_default_folder(), _DEFAULT_BYTES))
    return _cache[0]
