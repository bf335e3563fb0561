"""descent chaos on real Ray actors: every kind of fault once, and a verdict that can be trusted."""

import json
import subprocess
from pathlib import Path

import pytest

from descent.config.schema import CHAOS_KINDS, CLUSTER_KINDS
from tests.cluster.runs import DESCENT, incidents_of, logged_steps

# Wide, so that a step takes some milliseconds: the faults need a run that lasts longer than they do.
RUN = [
    "experiment=digits",
    "model.width=256",
    "epochs=null",
    "steps=500",
    "batch.size=64",
    "evaluate.every=200",
    "workers=3",
    "spares=2",
    "slots=4",
    "resources.cpus=0.25",
    "tracking.system_metrics=false",
    "regroup.heartbeat_s=2",
    "chaos.every_s=0.5",
]


def chaos(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([DESCENT, "chaos", *arguments], cwd=folder, capture_output=True, text=True, timeout=560)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def wild(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Each kind once; beside it, its reference: a finished run that nothing disturbed."""
    return chaos(folder, "--json", *RUN, "name=wild", f"chaos.faults={len(CHAOS_KINDS)}")


def test_every_kind_of_fault_is_survived_and_no_bit_tells(
    folder: Path, wild: "subprocess.CompletedProcess[str]"
) -> None:
    assert wild.returncode == 0, wild.stdout + wild.stderr
    verdict = json.loads(wild.stdout)
    assert verdict["passed"] and verdict["bits_equal"] is True
    assert verdict["struck"] == verdict["survived"] == len(CHAOS_KINDS)
    assert {k: v["survived"] for k, v in verdict["kinds"].items()} == dict.fromkeys(CHAOS_KINDS, 1)
    # A worker's fault costs no step. With the cluster or the driver all replicas are gone: it costs
    # what was committed since the last checkpoint.
    by_worker = [kind["steps_lost"] for name, kind in verdict["kinds"].items() if name not in CLUSTER_KINDS]
    assert sum(by_worker) == 0
    assert verdict["steps_lost"] == sum(kind["steps_lost"] for kind in verdict["kinds"].values())
    assert {"driver lost", "cluster lost", "worker lost"} <= {i["kind"] for i in incidents_of(folder, "wild")}
    assert logged_steps(folder, "wild") == list(range(1, 501))
    assert 0 < verdict["recovery_median_s"] <= verdict["recovery_worst_s"]


@pytest.mark.slow
@pytest.mark.usefixtures("wild")
def test_a_finished_run_is_done_again_under_chaos(folder: Path) -> None:
    refused = chaos(folder, "wild-reference", "optimizer.lr=0.5", "workers=2")
    assert refused.returncode == 2 and "changes the training itself" in refused.stderr
    done = chaos(
        folder, "--json", "wild-reference", "workers=2", "chaos.faults=3", "chaos.seed=3", "chaos.kinds.stop=0"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["passed"] and verdict["bits_equal"] is True
    assert 1 <= verdict["struck"] == verdict["survived"] <= 3
