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

from descent.data.storage import Storage
from descent.errors import DataError

_PATIENCE_S = 1800.0  # for another worker that fetches the same file
_ATTEMPTS = 3
_LOOK_S = 0.02
_COMING = "coming"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NodeCache:
    """Files in `folder`, at most `max_bytes` of them."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def get(self, storage: Storage, name: str, size: int, sha256: str | None, key: str | None = None) -> Path:
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
            (self.folder / _COMING).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache.dir={self.folder}: can't be made: {error}") from error
        # the name of what is on its way says how much room it will take
        part = self.folder / _COMING / f"{key}.{size}"
        with _locked(self.folder / _COMING / f"{key}.lock") as lock:
            try:
                if not _touch(path):
                    self._fetch(storage, name, size, sha256, part)
                    part.replace(path)
            finally:
                lock.unlink(missing_ok=True)
        return path

    def _fetch(self, storage: Storage, name: str, size: int, sha256: str | None, part: Path) -> None:
        wrong = ""
        for _ in range(_ATTEMPTS):
            self._make_room(part, self.max_bytes - size)
            try:
                storage.fetch(name, part)
                wrong = _difference(part, size, sha256)
            except OSError as error:
                wrong = f"can't be written to {self.folder}: {error.strerror}"
                if error.errno in _FULL and not self._make_room(part, 0):
                    break
            except BaseException:
                _clear(part)
                raise
            if not wrong:
                return
            _clear(part)
        raise DataError(
            f"{storage.uri}/{name}: {wrong} ({_ATTEMPTS} attempts at most); is data.cache.dir on a "
            "disk with room, and the file as its index says (descent data inspect)?"
        )

    def _make_room(self, part: Path, allowed: int) -> bool:
        """Delete what was used longest ago until `allowed` bytes are left; whether anything was.

        What others are fetching counts in full, what a dead process left is cleared away.
        """
        with _locked(self.folder / "room.lock"):
            coming = 0
            for file in (self.folder / _COMING).iterdir():
                if file.suffix != ".lock" and file != part:
                    if _abandoned(file):
                        file.unlink(missing_ok=True)
                    else:
                        coming += int(file.suffix[1:]) if file.suffix[1:].isdigit() else 0
            part.touch()
            whole = []
            for file in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    stat = file.stat()
                    if file.is_file() and file.suffix != ".lock":
                        whole.append((stat.st_mtime_ns, stat.st_size, file))
            total, evicted = coming + sum(size for _, size, _ in whole), False
            for _, size, file in sorted(whole):
                if total <= allowed:
                    break
                file.unlink(missing_ok=True)
                total, evicted = total - size, True
            return evicted


def _clear(part: Path) -> None:
    for file in part.parent.glob(f"*{part.name}*"):
        file.unlink(missing_ok=True)


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
def _locked(file: Path) -> Iterator[Path]:
    """Hold an exclusive lock. Raises DataError when somebody else keeps it for half an hour."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        with file.open("a") as lock:
            while not _take(lock.fileno()):
                if time.monotonic() > deadline:
                    raise DataError(f"{file}: another process has held it for {_PATIENCE_S / 60:g} minutes")
                time.sleep(_LOOK_S)
            # whoever held it may have deleted the file: then this lock is nobody's
            if not _is_at(lock.fileno(), file):
                continue
            yield file
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
    lock = part.with_name(f"{part.name.lstrip('.').split('.')[0]}.lock")
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
