"""A run on this machine keeps to itself: its ports, its folder, and what it imports."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from descent.cluster.workers.ray_cluster import _refuse_old_ray
from descent.errors import ClusterError

DESCENT = str(Path(sys.executable).with_name("descent"))
# Names of modules of Python and of installed libraries; a run imports each of them somewhere.
LIKE_LIBRARIES = [
    "queue",
    "statistics",
    "xxhash",
    "resource",
    "secrets",
    "random",
    "numpy",
    "torch",
    "ray",
    "mlflow",
    "yaml",
]
MARK = "import pathlib\npathlib.Path(__file__).with_suffix('.executed').touch()\nraise ImportError('of the folder')\n"


def test_ports_folder_and_imports_of_a_run_are_its_own(tmp_path: Path) -> None:
    for name in LIKE_LIBRARIES:
        (tmp_path / f"{name}.py").write_text(MARK)
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n  def __init__(self):\n"
        "    super().__init__(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    # A temporary folder of its own, with a short path (Ray's sockets lie in it): other runs have their folders elsewhere.
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))
    process = subprocess.Popen(
        [
            DESCENT,
            "train",
            "model=custom",
            "model._target_=mine.Net",
            "trusted_modules=[mine]",
            "workers=2",
            "epochs=8",
        ],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    listening: dict[str, str] = {}
    modes: dict[Path, int] = {}
    while process.poll() is None:
        for child in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
            try:
                for connection in child.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        listening[f"{child.name()} {connection.laddr.port}"] = connection.laddr.ip
            except psutil.Error:
                continue
        for folder in temporary.glob("descent-ray-*"):
            modes[folder] = stat.S_IMODE(folder.stat().st_mode)
        time.sleep(0.2)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert any("raylet" in name for name in listening)
    open_to_others = {
        n: ip for n, ip in listening.items() if not ip.removeprefix("::ffff:").startswith("127.") and ip != "::1"
    }
    assert open_to_others == {}
    assert set(modes.values()) == {0o700} and not any(folder.exists() for folder in modes)
    shutil.rmtree(temporary)
    assert [f.name for f in tmp_path.glob("*.executed")] == []


@pytest.mark.parametrize("version", ["2.50.0", "2.51.2", "1.13.0"])
def test_a_ray_that_ignores_the_token_is_refused(version: str) -> None:
    with pytest.raises(ClusterError, match=rf"^ray {version}: is too old, .*pip install 'ray\[default\]>=2.52'"):
        _refuse_old_ray(version)


@pytest.mark.parametrize("version", ["2.52.0", "2.60.0", "3.0.0rc1"])
def test_a_newer_ray_is_used(version: str) -> None:
    _refuse_old_ray(version)
