"""A file that is replaced is the old one or the new one, whatever happens in between."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from descent.storage.atomic import PRIVATE, replacing, write_atomic

KILLED = """
import os, signal, sys
from pathlib import Path
from descent.storage.atomic import replacing
with replacing(Path(sys.argv[1])) as descriptor:
    os.write(descriptor, b"half of the new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_text_and_bytes_replace_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "file"
    for content in ("grün", b"\0" * 3_000_000, ""):
        write_atomic(file, content)
        assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert [p.name for p in file.parent.iterdir()] == ["file"]


def test_a_private_file_is_never_readable_by_others(tmp_path: Path) -> None:
    """Nor is the temporary one, while it is written; a file that others could read becomes private."""
    file = tmp_path / "file"
    file.write_text("old")
    file.chmod(0o644)
    with replacing(file, mode=PRIVATE) as descriptor:
        os.write(descriptor, b"secret")
        assert os.fstat(descriptor).st_mode & 0o777 == 0o600
    assert file.stat().st_mode & 0o777 == 0o600 and file.read_text() == "secret"


def test_an_exception_or_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with contextlib.suppress(ValueError), replacing(file) as descriptor:
        os.write(descriptor, b"new")
        raise ValueError
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(file)], check=False)
    assert done.returncode == -signal.SIGKILL and file.read_text() == "old"
    write_atomic(file, "new")
    assert file.read_text() == "new"


def test_without_replacing_the_first_writer_wins(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for _ in range(2):
        try:
            with replacing(file, replace=False) as descriptor:
                os.write(descriptor, b"first" if not file.exists() else b"second")
        except FileExistsError:
            assert file.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
