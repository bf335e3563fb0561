"""Following a submitted job over a connection that is cut."""

from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus
from rich.console import Console

from descent.cluster import jobs

LOG = "starting\nstep 1\nstep 2\nfinished\n"


class JobsApi:
    """Ray's JobSubmissionClient, of which each answer is given: a value, or an exception."""

    def __init__(self, *infos: object, cuts: int) -> None:
        self._infos, self._cuts = list(infos), cuts

    def get_job_info(self, _: str) -> object:
        info = self._infos.pop(0) if len(self._infos) > 1 else self._infos[0]
        if isinstance(info, Exception):
            raise info
        return info

    async def tail_job_logs(self, _: str):
        yield LOG[:12]
        if self._cuts:
            self._cuts -= 1
            yield LOG[12:20]
            raise ConnectionResetError("cut")
        yield LOG[12:]

    def get_job_logs(self, _: str) -> str:
        return LOG


def info(status: JobStatus, code: int | None = None) -> object:
    return SimpleNamespace(status=status, driver_exit_code=code)


@pytest.mark.parametrize(("end", "code"), [(info(JobStatus.SUCCEEDED), 0), (info(JobStatus.FAILED, 130), 130)])
def test_a_cut_connection_is_made_again_and_the_log_goes_on_where_it_stopped(
    end: object, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_ASK_EVERY_S", 0.0)
    running = info(JobStatus.RUNNING)
    api = JobsApi(running, ConnectionError("gone"), running, running, end, cuts=2)
    assert jobs._follow(api, "job", "http://head:8265", Console(width=200)) == code  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert out.startswith(LOG) and out.count("step 1") == 1


def test_a_connection_that_stays_cut_is_one_line_and_no_success(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_ASK_EVERY_S", 0.0)
    monkeypatch.setattr(jobs, "_RECONNECT_S", 0.0)
    api = JobsApi(info(JobStatus.RUNNING), ConnectionError("[refused]"), cuts=9)
    assert jobs._follow(api, "job", "http://head:8265", Console()) == 1  # type: ignore[arg-type]
    err = capsys.readouterr().err
    assert err.startswith("error: --address=http://head:8265: the connection was lost ([refused])")
    assert err.count("\n") == 1 and "ray job logs job --address http://head:8265 --follow" in err
