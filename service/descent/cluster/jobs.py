"""Handing a run to a Ray cluster through its Jobs API."""

import asyncio
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from descent.cluster.run.console import print_error, print_line
from descent.errors import ClusterError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_STARTING_S = 90.0
_RECONNECT_S = 60.0
"""How long a lost connection is tried again."""
_ASK_EVERY_S = 1.0
_NOT_YET = "No available agent"
"""What Ray says while a node's job agent has not registered itself yet."""
_EXIT = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 130}


def submit(
    overrides: Sequence[str],
    *,
    address: str | None,
    working_dir: Path | None,
    follow: bool,
    console: Console,
) -> int:
    """Submit `descent train OVERRIDES` and, if `follow`, print its log until it ends.

    Returns the exit code that the job's end means. Raises ClusterError in one line.
    """
    if address is None:
        raise ClusterError(
            "--address is not set: give the cluster's Jobs API, http://HEAD:8265, or set RAY_API_SERVER_ADDRESS"
        )
    if not re.match(r"^https?://", address):
        raise ClusterError(f"--address={address}: the Jobs API is reached over http: http://HEAD:8265")
    client = _client(address)
    words = ["descent", "train", *overrides]
    if not any(o.startswith("ray.address=") for o in overrides):
        words.append("ray.address=auto")
    environment: dict[str, Any] = {}
    if working_dir is not None:
        if not working_dir.is_dir():
            raise ClusterError(f"--working-dir={working_dir}: there is no such folder")
        environment["working_dir"] = str(working_dir)
    job_id = _hand_over(client, address, shlex.join(words), environment, console)
    print_line(console, f"job {job_id} submitted: {shlex.join(words)}")
    if not follow:
        return 0
    try:
        return _follow(client, job_id, address, console)
    except KeyboardInterrupt:
        print_line(console, f"\nno longer following; the job goes on: {_how_to_follow(job_id, address)}")
        return 0


def _how_to_follow(job_id: str, address: str) -> str:
    return f"ray job logs {job_id} --address {address} --follow"


def _hand_over(
    client: "JobSubmissionClient", address: str, entrypoint: str, environment: dict[str, Any], console: Console
) -> str:
    """The job's id. A cluster that has just started answers before it can take jobs, so this waits for it."""
    deadline, announced = time.monotonic() + _STARTING_S, False
    while True:
        try:
            return str(
                client.submit_job(entrypoint=entrypoint, runtime_env=environment, metadata={"service": "descent"})
            )
        except (RuntimeError, OSError) as error:
            if _NOT_YET not in str(error) or time.monotonic() > deadline:
                raise ClusterError(f"--address={address}: the cluster refused the job: {_first(error)}") from error
        if not announced:
            print_line(console, f"{address} is starting: waiting until it takes jobs")
        announced = True
        time.sleep(1.0)


def _follow(client: "JobSubmissionClient", job_id: str, address: str, console: Console) -> int:
    """Print the job's log until it ends; the exit code that its end means.

    A connection that is cut is made again, and the log goes on where it stopped. If that fails for
    `_RECONNECT_S`, one line says so, and the exit code is that of a failure: the end isn't known.
    """
    log = _LogPrinter()
    lost_at: float | None = None
    while True:
        try:
            info = client.get_job_info(job_id)
            lost_at = None
            if info.status.is_terminal():
                log.print_rest(client.get_job_logs(job_id))
                return _exit_code_of(info, job_id, console)
            asyncio.run(log.follow(client, job_id))
        except KeyboardInterrupt:
            raise
        except Exception as error:  # Ray, requests and aiohttp each have their own for a cut connection
            now = time.monotonic()
            lost_at = lost_at or now
            if now - lost_at > _RECONNECT_S:
                print_error(
                    ClusterError(
                        f"--address={address}: the connection was lost ({_first(error)}), so how job {job_id} ends is "
                        f"not known here; it goes on: {_how_to_follow(job_id, address)}"
                    )
                )
                return 1
        time.sleep(_ASK_EVERY_S)


class _LogPrinter:
    """Prints a job's log; after a reconnection, which begins with the whole log again, only what is new."""

    def __init__(self) -> None:
        self._printed = 0

    async def follow(self, client: "JobSubmissionClient", job_id: str) -> None:
        """Print what comes until the stream ends."""
        received = 0
        async for piece in client.tail_job_logs(job_id):
            known = max(0, self._printed - received)
            received += len(piece)
            self._print(piece[known:])

    def print_rest(self, whole: str) -> None:
        """Print what of the whole log has not been printed yet."""
        self._print(whole[self._printed :])

    def _print(self, text: str) -> None:
        if text:
            print(text, end="", flush=True)
            self._printed += len(text)


def _client(address: str) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, OSError) as error:
        hint = "; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on the cluster" if "401" in str(error) else ""
        raise ClusterError(f"--address={address}: can't reach the Jobs API: {_first(error)}{hint}") from error


def _exit_code_of(info: "JobDetails", job_id: str, console: Console) -> int:
    """What the end of a job means: the exit code of its `descent train` where that is known."""
    status = info.status.value
    print_line(console, f"job {job_id}: {status}")
    if status == "FAILED" and info.driver_exit_code not in (None, 0):
        return int(info.driver_exit_code)
    return _EXIT.get(status, 1)


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
