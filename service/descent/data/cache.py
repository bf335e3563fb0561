"""A node's cache of files that lie on S3: fetched once for all workers, verified, of bounded size.

    DIR/descent-data-cache/
        CACHEDIR.TAG            the marker: without it nothing here is ever deleted
        <64 hex digits>.bin     a file, named by the hash of its content: a shard that changes is
                                another file, and two data sets may share one
        coming/<hex>.<size>     a file on its way; its name says how much room it will take
        locks/<hex>.lock        held by the process that fetches that file

The cache deletes only files with such names in this folder, which is its own. Locks are the
kernel's (flock), so a process that dies leaves none behind. A file that is evicted while a
process has it mapped lives on until it is unmapped.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import filelock
import platformdirs

from descent.errors import DataError, StoreError
from descent.storage import Store
from descent.storage.atomic import write_atomic

_OWN_FOLDER = "descent-data-cache"
_MARKER = "CACHEDIR.TAG"
_MARKER_TEXT = """Signature: 8a477f597d28d172789f06886806bc55
# Descent keeps copies of remote data here and deletes them when it needs the room; bford.info/cachedir
"""
"""By this first line backup tools know a cache; see https://bford.info/cachedir/."""
_KEY = re.compile(r"[0-9a-f]{64}")
_CACHED = re.compile(r"[0-9a-f]{64}(\.[A-Za-z0-9]{1,16})?")
_COMING = re.compile(r"\.?([0-9a-f]{64})\.(\d+)(\.[0-9a-f]+\.partial)?")
"""A file on its way, or the temporary file that a store writes for it."""

_LOCK_TIMEOUT_S = 1800.0
"""How long to wait for another worker that fetches the same file."""
_ATTEMPTS = 3
_DEFAULT_BYTES = 20 * 10**9


class NodeCache:
    """Copies of remote files in a folder of the cache's own below `folder`, at most `max_bytes` of them."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder / _OWN_FOLDER
        self.max_bytes = max_bytes

    def get(self, store: Store, name: str, size: int, sha256: str | None, key: str | None = None) -> Path:
        """The local copy of the file `name` of `store`, fetched unless it is here.

        size: its bytes. sha256: what the content must hash to; None where nobody knows: `key`,
        also 64 hexadecimal digits, then names the copy.
        Raises DataError when the file can't be fetched, isn't what size and hash say (after
        three attempts), or finds no room.
        """
        key = sha256 or key or ""
        if not _KEY.fullmatch(key):
            raise DataError(f"{store.address}/{name}: sha256 {key!r} is not 64 hexadecimal digits; mend the index")
        suffix = Path(name).suffix
        path = self.folder / (f"{key}{suffix}" if _CACHED.fullmatch(f"{key}{suffix}") else key)
        if _mark_used(path):
            return path
        if size > self.max_bytes:
            raise DataError(
                f"{store.address}/{name} has {size} bytes, the cache holds {self.max_bytes}: "
                "give it more with data.cache.gb"
            )
        self._prepare_folder()
        coming = self.folder / "coming" / f"{key}.{size}"
        with self._locked(key, remove=True):
            if not _mark_used(path):
                self._fetch(store, name, size, sha256, coming)
                coming.replace(path)
        return path

    def _prepare_folder(self) -> None:
        """Make the cache's folder with its marker. Raises DataError if somebody else's files are in it."""
        marker = self.folder / _MARKER
        try:
            # Looked at in this order, since another worker may be making the folder at the same time.
            names = {file.name for file in self.folder.iterdir()} if self.folder.exists() else set()
            if not marker.is_file():
                if any(not name.startswith(f".{_MARKER}") for name in names):
                    raise DataError(
                        f"data.cache.dir={self.folder.parent}: its {_OWN_FOLDER} holds files and no {_MARKER}, so it "
                        "is not a cache of Descent's; choose another folder"
                    )
                write_atomic(marker, _MARKER_TEXT, durable=False)
            for name in ("coming", "locks"):
                (self.folder / name).mkdir(exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache.dir={self.folder.parent}: can't be made: {error}") from error

    def _fetch(self, store: Store, name: str, size: int, sha256: str | None, coming: Path) -> None:
        try:
            problem = self._try_to_fetch(store, name, size, sha256, coming)
        except BaseException:
            coming.unlink(missing_ok=True)
            raise
        if problem:
            coming.unlink(missing_ok=True)
            raise DataError(
                f"{problem} ({store.address}/{name}, {_ATTEMPTS} attempts at most); is data.cache.dir on a "
                "disk with room, and the file as its index says (descent data inspect)?"
            )

    def _try_to_fetch(self, store: Store, name: str, size: int, sha256: str | None, coming: Path) -> str:
        """Download the file to `coming`; what was wrong with the last attempt, or "" after a good one."""
        problem = ""
        for _ in range(_ATTEMPTS):
            self._make_room(coming, self.max_bytes - size)
            try:
                store.download(name, coming, size=size, sha256=sha256)
                return ""
            except StoreError as error:
                problem = str(error)
                if error.kind not in ("full", "damaged"):
                    raise DataError(problem) from error
                if error.kind == "full" and not self._make_room(coming, 0):
                    break
        return problem

    def _make_room(self, coming: Path, allowed: int) -> bool:
        """Evict the files used longest ago until `allowed` bytes are left; returns whether any was evicted.

        A file that another process is fetching counts with its full size; the remains of a
        process that died are removed.
        """
        with self._locked("room"):
            total = 0
            for file in (self.folder / "coming").iterdir():
                found = _COMING.fullmatch(file.name)
                if found is None or file == coming or self._removed_as_abandoned(file, found[1]):
                    continue
                total += 0 if found[3] else int(found[2])  # the temporary file is part of the same size
            coming.touch()
            cached = []
            for file in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if _CACHED.fullmatch(file.name) and file.is_file() and not file.is_symlink():
                        stat = file.stat()
                        cached.append((stat.st_mtime_ns, stat.st_size, file))
            total += sum(size for _, size, _ in cached)
            evicted = False
            for _, size, file in sorted(cached):
                if total <= allowed:
                    break
                file.unlink(missing_ok=True)
                total, evicted = total - size, True
            return evicted

    def _removed_as_abandoned(self, file: Path, key: str) -> bool:
        """Remove an unfinished file if no process holds its key's lock; returns whether it is removed."""
        try:
            with self._locked(key, timeout_s=0, remove=True):
                file.unlink(missing_ok=True)
        except filelock.Timeout:
            return False
        return True

    @contextlib.contextmanager
    def _locked(self, name: str, *, timeout_s: float | None = None, remove: bool = False) -> Iterator[None]:
        """Hold the lock of that name; other threads and processes wait.

        timeout_s: raise filelock.Timeout after so long; None raises DataError after half an hour.
        remove: delete the lock's file at the end (safe while it is held: filelock looks).
        """
        lock = filelock.FileLock(self.folder / "locks" / f"{name}.lock", poll_interval=0.02)
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_S if timeout_s is None else timeout_s)
        except filelock.Timeout as error:
            if timeout_s is not None:
                raise
            raise DataError(
                f"{lock.lock_file}: another process has held it for {_LOCK_TIMEOUT_S / 60:g} minutes"
            ) from error
        try:
            yield
        finally:
            if remove:
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def _mark_used(path: Path) -> bool:
    """Whether the file is here; if so its time of change becomes now, by which eviction goes."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except PermissionError:
        return path.is_file()
    return True


_cache: list[NodeCache] = []


def use_cache(folder: str | None, gigabytes: float) -> None:
    """Set this process's cache; without a folder it lies in the user's cache folder."""
    where = Path(folder).expanduser() if folder else _default_folder()
    _cache[:] = [NodeCache(where, int(gigabytes * 1e9))]


def _default_folder() -> Path:
    return platformdirs.user_cache_path("descent", appauthor=False)


def node_cache() -> NodeCache:
    """The cache that this process uses; 20 GB in the user's cache folder unless `use_cache` was called."""
    if not _cache:
        _cache.append(NodeCache(_default_folder(), _DEFAULT_BYTES))
    return _cache[0]
