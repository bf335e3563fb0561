"""Handing a run to a Ray cluster through its Jobs API."""

import asyncio
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from descent.errors import ClusterError

_STARTING_S = 90.0
_NOT_YET = "No available agent"
"""Ray's words while a node's job agent has not registered itself yet."""
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
        raise ClusterError(f"--address={address}: the Jobs API is spoken to over http, e.g. http://HEAD:8265")
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
    console.print(f"job {job_id} submitted: {shlex.join(words)}", highlight=False, soft_wrap=True)
    if not follow:
        return 0
    try:
        asyncio.run(_follow(client, job_id))
    except KeyboardInterrupt:
        console.print(
            f"\nno longer following; the job goes on: ray job logs {job_id} --address {address} --follow",
            highlight=False,
            soft_wrap=True,
        )
        return 0
    return _outcome(client, job_id, console)


def _hand_over(client: Any, address: str, entrypoint: str, environment: dict[str, Any], console: Console) -> str:
    """The job's id. A cluster that has just started answers before it can take jobs: it is given time."""
    deadline, told = time.monotonic() + _STARTING_S, False
    while True:
        try:
            return str(
                client.submit_job(entrypoint=entrypoint, runtime_env=environment, metadata={"service": "descent"})
            )
        except RuntimeError as error:
            if _NOT_YET not in str(error) or time.monotonic() > deadline:
                raise ClusterError(f"--address={address}: the cluster refused the job: {_first(error)}") from error
        if not told:
            console.print(f"{address} is starting: waiting until it takes jobs", highlight=False)
        told = True
        time.sleep(1.0)


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        hint = "; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on the cluster" if "401" in str(error) else ""
        raise ClusterError(f"--address={address}: can't reach the Jobs API: {_first(error)}{hint}") from error


async def _follow(client: Any, job_id: str) -> None:
    async for piece in client.tail_job_logs(job_id):
        print(piece, end="", flush=True)


def _outcome(client: Any, job_id: str, console: Console) -> int:
    info = client.get_job_info(job_id)
    status = str(info.status.value if hasattr(info.status, "value") else info.status)
    console.print(f"job {job_id}: {status}", highlight=False)
    if status == "FAILED" and info.driver_exit_code not in (None, 0):
        return int(info.driver_exit_code)
    return _EXIT.get(status, 1)


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
