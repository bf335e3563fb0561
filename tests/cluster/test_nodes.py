"""Nodes that say goodbye, and nodes that are lost: several Ray nodes on one machine, as `ray start` makes them."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.runs import (
    dawdling,
    end,
    incidents_of,
    logged_steps,
    members_of,
    resume,
    slow_network,
    start,
    wait_for_step,
)
from tests.end_to_end.services import RAY, SMALL, answers, free_port, own_address, process, until

STEPS = 150


_DRAIN = """
import subprocess, sys
import ray
address, program, why, deadline = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
(node,) = {n["NodeID"] for n in ray.nodes() if n["Alive"] and "node:__internal_head__" not in n["Resources"]}
subprocess.run([program, "drain-node", "--address", address, "--node-id", node, "--reason",
                "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", why,
                "--deadline-remaining-seconds", deadline], check=True)
print(node)
"""


_KILL = """
import subprocess, sys
import ray
address, program, name, *options = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
(actor,) = [a for a in ray.util.list_named_actors(all_namespaces=True) if a["name"] == name]
subprocess.run([program, "kill-actor", "--address", address, "--name", name, "--namespace",
                actor["namespace"], *options], check=True)
"""


class Nodes:
    """A head with one CPU; more nodes of one CPU each come and go."""

    def __init__(self, folder: Path, environment: dict[str, str], address: str, head: int) -> None:
        """head: its process id."""
        self.folder, self._environment, self.address = folder, environment, address
        self._head = psutil.Process(head)
        self._count = 0

    @contextmanager
    def more(self) -> Iterator[Callable[[signal.Signals], None]]:
        """One more node; yields how to send a signal to it (SIGKILL: to all its processes)."""
        self._count += 1
        log = self.folder / f"node-{self._count}.log"
        command = [RAY, "start", f"--address={self.address}", *SMALL]
        with process(command, log, self._environment) as node:

            def send(number: signal.Signals) -> None:
                if number is signal.SIGKILL:
                    os.killpg(node.pid, number)
                else:
                    os.kill(node.pid, number)

            until(lambda: "Ray runtime started" in log.read_text(), "the node")
            yield send

    def drain(self, why: str, deadline_s: int) -> str:
        """Announce the end of the node that is not the head, as `ray drain-node` does; its id."""
        return self._tell_ray(_DRAIN, why, str(deadline_s)).splitlines()[-1]

    def kill_actor(self, name: str, *options: str) -> None:
        """End an actor as `ray kill-actor` does."""
        self._tell_ray(_KILL, name, *options)

    def kill_gcs(self) -> None:
        """End the process in which the head keeps the cluster's state: the head is gone for good."""
        (gcs,) = [child for child in self._head.children(recursive=True) if child.name() == "gcs_server"]
        gcs.kill()

    def _tell_ray(self, script: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, self.address, RAY, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "nets.py").write_text(slow_network(0.05, folder))
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        port, dashboard = free_port(), free_port()
        temporary = Path("/tmp") / f"ray-{secrets.token_hex(4)}"  # sockets' paths must be short
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        head = [
            RAY,
            "start",
            "--head",
            f"--port={port}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--temp-dir={temporary}",
            *SMALL,
        ]
        started = stack.enter_context(process(head, folder / "head.log", {**os.environ}))
        url = f"http://127.0.0.1:{dashboard}/api/gcs_healthz"
        until(lambda: answers(url), "the Ray head")
        yield Nodes(folder, {**os.environ}, f"{own_address()}:{port}", started.pid)


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes) -> dict[str, Any]:
    code, summary, err = end(start(nodes.folder, "undisturbed", "Slow", *LENGTH, "workers=1"))
    assert code == 0, err
    return summary


LENGTH = [f"steps={STEPS}", "slots=2"]


def test_a_nodes_sigterm_is_a_pause_and_a_goodbye_and_a_new_node_is_made_use_of(
    nodes: Nodes, undisturbed: dict[str, Any]
) -> None:
    with nodes.more() as send, ExitStack() as stack:
        run = start(
            nodes.folder,
            "drained",
            "Slow",
            *LENGTH,
            f"ray.address={nodes.address}",
            "workers=2",
            "regroup.max_failures=0",
        )
        wait_for_step(run, nodes.folder, "drained", 10)
        send(signal.SIGTERM)
        until(lambda: bool(incidents_of(nodes.folder, "drained")), "the goodbye")
        with dawdling(nodes.folder):  # a node takes its time to start
            stack.enter_context(nodes.more())
            until(lambda: len(members_of(nodes.folder, "drained")) == 2, "the new node's worker")
        code, summary, err = end(run)
    assert code == 0, err
    assert [i["kind"] for i in incidents_of(nodes.folder, "drained")] == ["preempted"]
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert logged_steps(nodes.folder, "drained") == list(range(1, STEPS + 1))
    assert ": 1 worker from" in err and len(set(summary["workers"].values())) == 2


def test_a_node_that_ray_is_told_to_drain_is_left_in_time(nodes: Nodes, undisturbed: dict[str, Any]) -> None:
    """What Ray's autoscaler and a preemption notice do: the node lives on until the deadline."""
    with nodes.more():
        run = start(
            nodes.folder,
            "asked",
            "Slow",
            *LENGTH,
            f"ray.address={nodes.address}",
            "workers=2",
            "regroup.max_failures=0",
        )
        wait_for_step(run, nodes.folder, "asked", 10)
        with dawdling(nodes.folder):
            away = nodes.drain("preempted in 60 s", deadline_s=60)
            until(lambda: bool(incidents_of(nodes.folder, "asked")), "the goodbye")
        code, summary, err = end(run)
    assert code == 0, err
    (incident,) = incidents_of(nodes.folder, "asked")
    assert (incident["kind"], incident["steps_lost"]) == ("preempted", 0)
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert logged_steps(nodes.folder, "asked") == list(range(1, STEPS + 1))
    assert len(summary["workers"]) == 1 and away not in summary["workers"].values()


@pytest.mark.parametrize("options", [("--force",), ()], ids=["at once", "asked to end"])
def test_an_actor_that_ray_is_told_to_kill_is_replaced(
    nodes: Nodes, undisturbed: dict[str, Any], options: tuple[str, ...]
) -> None:
    name = "killed-by-ray" if options else "ended-by-ray"
    run = start(
        nodes.folder,
        name,
        "Slow",
        *LENGTH,
        f"ray.address={nodes.address}",
        "workers=2",
        "resources.cpus=0.5",
    )
    wait_for_step(run, nodes.folder, name, 10)
    with dawdling(nodes.folder):
        nodes.kill_actor(f"{name}/w1", *options)
        until(lambda: members_of(nodes.folder, name) == {"w0", "w2"}, "the other worker")
    code, summary, err = end(run)
    assert code == 0, err
    (incident,) = incidents_of(nodes.folder, name)
    assert (incident["kind"], incident["worker"], incident["steps_lost"]) == (
        "worker lost",
        "w1",
        0,
    )
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert logged_steps(nodes.folder, name) == list(range(1, STEPS + 1))
    assert summary["workers"].keys() == {"w0", "w2"}


def test_with_too_few_nodes_left_the_state_is_saved_and_the_run_goes_on_later(
    nodes: Nodes, undisturbed: dict[str, Any]
) -> None:
    least = [
        *LENGTH,
        f"ray.address={nodes.address}",
        "workers={min: 2, max: 2}",
        "regroup.wait_s=3",
    ]
    with nodes.more() as send:
        run = start(nodes.folder, "few", "Slow", *least)
        wait_for_step(run, nodes.folder, "few", 20)
        send(signal.SIGKILL)
        code, summary, err = end(run)
    assert code == 1, err
    assert summary["reason"] == "only 1 of at least 2 workers could be had for 3 s"
    assert Path(summary["checkpoint"]).name == f"step-{summary['step']:08d}"
    with nodes.more():
        code, summary, err = end(resume(nodes.folder, "few", f"ray.address={nodes.address}"))
    assert code == 0, err
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert logged_steps(nodes.folder, "few") == list(range(1, STEPS + 1))


def test_a_cluster_whose_head_is_gone_ends_the_run_with_its_reason_and_it_goes_on_elsewhere(
    nodes: Nodes, undisturbed: dict[str, Any]
) -> None:
    """The last test of this file, because no head is left after it."""
    run = start(
        nodes.folder, "headless", "Slow", *LENGTH, f"ray.address={nodes.address}", "workers=1", "checkpoint.every=10"
    )
    wait_for_step(run, nodes.folder, "headless", 25)
    nodes.kill_gcs()
    code, summary, err = end(run)
    assert (code, summary["state"]) == (1, "FAILED"), err
    assert "has not answered for" in summary["reason"] and "resume" in summary["reason"]
    assert "cluster lost" in [i["kind"] for i in incidents_of(nodes.folder, "headless")]
    assert Path(summary["checkpoint"]).is_dir()
    code, summary, err = end(resume(nodes.folder, "headless", "ray.address=null"))
    assert code == 0, err
    assert summary["state_sha256"] == undisturbed["state_sha256"]
    assert logged_steps(nodes.folder, "headless") == list(range(1, STEPS + 1))
