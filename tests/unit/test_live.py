"""A run's control files: its status, and the request to scale it."""

import os
import threading
from pathlib import Path

import pytest

from descent.cluster.control.control_file import ControlFile, ask_to_scale, read_status
from descent.config import WorkerRange
from descent.errors import ClusterError


def test_a_request_is_answered_through_the_folder(tmp_path: Path) -> None:
    live = ControlFile(tmp_path)
    live.show(state="RUNNING", generation=1)
    done = threading.Event()

    def controller() -> None:
        while not done.is_set():
            request = live.next_request()
            if request is not None:
                live.answer(request, request.high <= 4, f"{request.low} to {request.high}")
            done.wait(0.01)

    thread = threading.Thread(target=controller)
    thread.start()
    try:
        assert ask_to_scale(tmp_path, WorkerRange(min=2, max=3), wait_s=60.0) == "2 to 3"
        assert ask_to_scale(tmp_path, 4, wait_s=60.0) == "1 to 4"
        with pytest.raises(ClusterError, match="1 to 5"):
            ask_to_scale(tmp_path, 5, wait_s=60.0)
    finally:
        done.set()
        thread.join()


def test_a_run_that_ended_or_whose_process_is_gone_is_not_running(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="is not running"):
        read_status(tmp_path)
    live = ControlFile(tmp_path)
    live.show(state="RUNNING", generation=1)
    assert read_status(tmp_path)["pid"] == os.getpid()
    live.show(state="FINISHED", generation=1)
    with pytest.raises(ClusterError, match=r"is not running \(FINISHED\)"):
        read_status(tmp_path)
    live.show(state="RUNNING", generation=1)
    status = tmp_path / "status.json"
    gone = 2**22 + 1  # above the largest process id
    status.write_text(status.read_text().replace(str(os.getpid()), str(gone)))
    with pytest.raises(ClusterError, match="its process is gone"):
        ask_to_scale(tmp_path, 2, wait_s=1.0)


def test_what_is_no_request_is_no_request(tmp_path: Path) -> None:
    for content in ("", "{", "[]", '{"number": 1}', '{"number": 1, "low": "x", "high": 2}'):
        live = ControlFile(tmp_path)
        (tmp_path / "scale.json").write_text(content)
        assert live.next_request() is None
