"""A folder as a store: files appear under their name by a rename, synced before it."""

import contextlib
import errno
import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from descent.errors import StoreError
from descent.storage.base import Content, Entry, Progress, checked
from descent.storage.direct_io import write_direct

_PIECE = 8 << 20
_PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def explain(error: OSError, path: Path) -> StoreError:
    """What the operating system refused, as one line with what to do."""
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


def sync(path: Path) -> None:
    """Until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalStore:
    """See `base.Store`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def address(self) -> str:
        return str(self.root)

    def at(self, *parts: str) -> "LocalStore":
        return LocalStore(self.root.joinpath(*(checked(p) for p in parts)))

    def _path(self, key: str) -> Path:
        return self.root / checked(key)

    @contextlib.contextmanager
    def _asking(self, key: str) -> Iterator[Path]:
        path = self._path(key)
        try:
            yield path
        except OSError as error:
            raise explain(error, path) from error

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
            with _appearing(target) as descriptor:
                while piece := file.read(_PIECE):
                    digest.update(piece)
                    _write(descriptor, piece, progress)
                if size is not None and os.fstat(descriptor).st_size != size:
                    raise StoreError(f"{path}: has not the expected {size} bytes", kind="damaged")
                if sha256 is not None and digest.hexdigest() != sha256:
                    raise StoreError(f"{path}: its SHA-256 is not the expected one", kind="damaged")

    def put(self, key: str, content: Content) -> None:
        with self._asking(key) as path, _appearing(path) as descriptor:
            _write(descriptor, content, None)

    def put_if_absent(self, key: str, content: Content) -> bool:
        with self._asking(key) as path:
            try:
                with _appearing(path, replace=False) as descriptor:
                    _write(descriptor, content, None)
            except FileExistsError:
                return False
            return True

    def upload(self, source: Path | Content, key: str, progress: Progress | None = None) -> None:
        with self._asking(key) as path, _appearing(path) as descriptor:
            if isinstance(source, Path):
                with source.open("rb") as file:
                    while piece := file.read(_PIECE):
                        _write(descriptor, piece, progress)
            else:
                done = write_direct(descriptor, source, progress)
                _write(descriptor, memoryview(source).cast("B")[done:], progress)

    def size(self, key: str) -> int | None:
        with self._asking(key) as path:
            try:
                return path.stat().st_size if path.is_file() else None
            except FileNotFoundError:
                return None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        try:
            found = [
                Path(folder, name)
                for folder, _, names in os.walk(self.root, onerror=_raise)
                for name in names
                if not name.endswith(_PARTIAL)
            ]
        except FileNotFoundError:
            return
        except OSError as error:
            raise explain(error, self.root) from error
        for key, path in sorted((p.relative_to(self.root).as_posix(), p) for p in found):
            with contextlib.suppress(FileNotFoundError):
                if key.startswith(prefix):
                    stat = path.stat()
                    yield Entry(key, stat.st_size, stat.st_mtime)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._asking(key) as path:
                path.unlink(missing_ok=True)
                # A folder on S3 is gone with its last object.
                with contextlib.suppress(OSError):
                    path.parent.rmdir()

    def tidy(self, prefix: str = "", older_than_s: float = 86400.0) -> int:
        count, now = 0, time.time()
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(OSError):
                    if (
                        name.endswith(_PARTIAL)
                        and path.relative_to(self.root).as_posix().startswith(prefix)
                        and now - path.stat().st_mtime > older_than_s
                    ):
                        path.unlink()
                        count += 1
        return count


def _raise(error: OSError) -> None:
    raise error


@contextlib.contextmanager
def _appearing(path: Path, *, replace: bool = True) -> Iterator[int]:
    """A descriptor to write to; at the end of the block the file is there, whole and synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}{_PARTIAL}")
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if replace:
            partial.replace(path)
        else:
            os.link(partial, path)  # fails where there is one, unlike a rename
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _write(descriptor: int, content: Content, progress: Progress | None) -> None:
    view = memoryview(content).cast("B")
    while view.nbytes:
        done = os.write(descriptor, view[:_PIECE])
        view = view[done:]
        if progress is not None:
            progress(done)
