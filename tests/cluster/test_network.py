"""Nodes whose link is cut: Ray nodes in network namespaces, a head that stays and one that falls silent."""

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import namespaces
from tests.cluster.namespaces import Node
from tests.cluster.runs import (
    COMMON,
    DESCENT,
    end,
    incidents_of,
    logged_steps,
    slow_network,
    wait_for_step,
)
from tests.end_to_end.services import RAY, SMALL, process, until

WHY_NOT = namespaces.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
STEPS = 160
OVERRIDES = [*COMMON, "model._target_=nets.Slow", f"steps={STEPS}", "slots=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network")
    (path / "nets.py").write_text(slow_network(0.05, path))
    return path


@contextmanager
def cluster(folder: Path, environment: dict[str, str]) -> Iterator[tuple[Node, Node, str]]:
    """A head and a second Ray node, each on an end of its own cable."""
    temporary = Path("/tmp") / f"ray-{secrets.token_hex(4)}"  # sockets' paths must be short
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        head, other = stack.enter_context(namespaces.network(f"descent-{secrets.token_hex(3)}", 2))
        address = f"{head.address}:6379"
        for node, role in (
            (head, ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={temporary}"]),
            (other, [f"--address={address}"]),
        ):
            log = folder / f"{node.namespace}.log"
            command = [
                *node.inside,
                RAY,
                "start",
                *role,
                f"--node-ip-address={node.address}",
                *SMALL,
            ]
            stack.enter_context(process(command, log, environment))
            until(lambda log=log: "Ray runtime started" in log.read_text(), "a Ray node")  # type: ignore[misc]
        yield head, other, address


def train(
    folder: Path, name: str, *overrides: str, inside: list[str], environment: dict[str, str]
) -> "subprocess.Popen[str]":
    command = [*inside, DESCENT, "train", "--json", *OVERRIDES, f"name={name}", *overrides]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, Any]:
    code, summary, err = end(train(folder, "undisturbed", "workers=1", inside=[], environment={**os.environ}))
    assert code == 0, err
    return summary


@pytest.mark.parametrize(
    "back",
    [
        pytest.param(False, id="for-good"),
        pytest.param(True, id="and-mended", marks=pytest.mark.slow),
    ],
)
def test_a_node_whose_link_is_cut_costs_no_step_and_no_bit(
    folder: Path, undisturbed: dict[str, Any], back: bool
) -> None:
    """Nobody sees a connection end: the silence itself must be noticed. Mended, the old worker must not come back."""
    name = "mended" if back else "cut"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with cluster(folder, environment) as (head, other, address):
        run = train(
            folder,
            name,
            f"ray.address={address}",
            "workers=2",
            "regroup.heartbeat_s=2",
            inside=head.inside,
            environment=environment,
        )
        wait_for_step(run, folder, name, 20)
        other.cut()
        until(lambda: bool(incidents_of(folder, name)), "the loss of a worker", 60)
        if back:
            other.mend()
        code, summary, err = end(run)
        assert code == 0, err
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert logged_steps(folder, name) == list(range(1, STEPS + 1))
    lost, *others = incidents_of(folder, name)
    assert lost["kind"] in ("worker lost", "node lost") and lost["steps_lost"] == 0
    assert not [i for i in others if i["steps_lost"]], json.dumps(others)
