"""A folder as a store: each file is written under a temporary name, synced, and then renamed."""

import contextlib
import errno
import hashlib
import os
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from descent.errors import StoreError
from descent.storage.atomic import PARTIAL, replacing
from descent.storage.base import Content, Entry, Progress, checked
from descent.storage.direct_io import write_direct

_PIECE = 8 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def explain(error: OSError, path: Path) -> StoreError:
    """The operating system's error as a StoreError: one line that names the path and says what to do."""
    if error.errno in _FULL:
        return StoreError(
            f"{path}: the disk is full ({error.strerror}); free some space or use another folder",
            kind="full",
        )
    if error.errno in _DENIED:
        return StoreError(
            f"{path}: not permitted ({error.strerror}); change the folder's rights or use another one",
            kind="denied",
        )
    if isinstance(error, FileNotFoundError):
        return StoreError(f"{path}: there is no such file", kind="missing")
    return StoreError(f"{path}: {error.strerror or error}", kind="unavailable")


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as a StoreError about `path`."""
    try:
        yield
    except OSError as error:
        raise explain(error, path) from error


class LocalStore:
    """See `base.Store`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def address(self) -> str:
        return str(self.root)

    @property
    def folder(self) -> Path | None:
        return self.root

    def at(self, *parts: str) -> "LocalStore":
        return LocalStore(self.root.joinpath(*(checked(p) for p in parts)))

    @contextlib.contextmanager
    def _asking(self, key: str) -> Iterator[Path]:
        """The key's path; an OSError of the block becomes a StoreError about it."""
        path = self.root / checked(key)
        with explaining(path):
            yield path

    def get(self, key: str) -> bytes:
        with self._asking(key) as path:
            return path.read_bytes()

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        with self._asking(key) as path, path.open("rb") as file:
            file.seek(start)
            found = file.read(stop - start)
        if len(found) != stop - start:
            raise StoreError(f"{path}: ends before byte {stop}", kind="damaged")
        return found

    def read(self, key: str, size: int, progress: Progress | None = None) -> bytearray:
        with self._asking(key) as path, path.open("rb", buffering=0) as file:
            actual = os.fstat(file.fileno()).st_size
            if actual != size:
                raise StoreError(f"{path}: {actual} bytes instead of {size}", kind="damaged")
            found = bytearray(size)
            view, at = memoryview(found), 0
            while at < size and (got := file.readinto(view[at : at + _PIECE])):
                at += got
                if progress is not None:
                    progress(got)
        return found

    def download(
        self,
        key: str,
        target: Path,
        *,
        size: int | None = None,
        sha256: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        with self._asking(key) as path, path.open("rb") as file:
            digest = hashlib.sha256()
            with explaining(target), replacing(target) as descriptor:
                while piece := file.read(_PIECE):
                    digest.update(piece)
                    _write(descriptor, piece, progress)
                actual = os.fstat(descriptor).st_size
                if size is not None and actual != size:
                    raise StoreError(f"{path}: {actual} bytes instead of {size}", kind="damaged")
                if sha256 is not None and (got := digest.hexdigest()) != sha256:
                    raise StoreError(
                        f"{path}: is corrupt: its SHA-256 is {got[:12]}…, not {sha256[:12]}…", kind="damaged"
                    )

    def put(self, key: str, content: Content) -> None:
        with self._asking(key) as path, replacing(path) as descriptor:
            _write(descriptor, content, None)

    def put_if_absent(self, key: str, content: Content) -> bool:
        with self._asking(key) as path:
            try:
                with replacing(path, replace=False) as descriptor:
                    _write(descriptor, content, None)
            except FileExistsError:
                return False
            return True

    def upload(self, source: Path | Content, key: str, progress: Progress | None = None) -> None:
        with self._asking(key) as path, replacing(path) as descriptor:
            if isinstance(source, Path):
                with source.open("rb") as file:
                    while piece := file.read(_PIECE):
                        _write(descriptor, piece, progress)
            else:
                done = write_direct(descriptor, source, progress)
                _write(descriptor, memoryview(source).cast("B")[done:], progress)

    def find(self, key: str) -> Entry | None:
        with self._asking(key) as path:
            try:
                found = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return _entry(key, found) if stat.S_ISREG(found.st_mode) else None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """As in `base.Store`. A folder below this one that can't be read counts as empty."""

        def report(error: OSError) -> None:
            if error.filename == str(self.root) and not isinstance(error, FileNotFoundError):
                raise error

        with explaining(self.root):
            found = [
                Path(folder, name)
                for folder, _, names in os.walk(self.root, onerror=report)
                for name in names
                if not name.endswith(PARTIAL)
            ]
        for key, path in sorted((p.relative_to(self.root).as_posix(), p) for p in found):
            if key.startswith(prefix):
                with contextlib.suppress(OSError):
                    entry = path.stat()
                    if stat.S_ISREG(entry.st_mode):
                        yield _entry(key, entry)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._asking(key) as path:
                path.unlink(missing_ok=True)
                # A folder on S3 is gone with its last object; the same holds here.
                with contextlib.suppress(OSError):
                    path.parent.rmdir()

    def tidy(self, prefix: str = "", older_than_s: float = 86400.0) -> int:
        count, now = 0, time.time()
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(OSError):
                    if (
                        name.endswith(PARTIAL)
                        and path.relative_to(self.root).as_posix().startswith(prefix)
                        and now - path.stat().st_mtime > older_than_s
                    ):
                        path.unlink()
                        count += 1
        return count


def _entry(key: str, found: os.stat_result) -> Entry:
    return Entry(key, found.st_size, found.st_mtime, str(found.st_mtime_ns))


def _write(descriptor: int, content: Content, progress: Progress | None) -> None:
    view = memoryview(content).cast("B")
    while view.nbytes:
        done = os.write(descriptor, view[:_PIECE])
        view = view[done:]
        if progress is not None:
            progress(done)
