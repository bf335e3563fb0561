"""The deployed topology without containers: a Ray head, a second node, MLflow on PostgreSQL, a submitted run."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.services import mlflow_on, postgres, ray_cluster, until

DESCENT = str(Path(sys.executable).with_name("descent"))


@pytest.mark.timeout(600)
def test_a_submitted_run_uses_both_nodes_and_is_kept_in_postgres(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with (
        postgres(tmp_path) as backend,
        mlflow_on(backend, tmp_path) as tracking,
        ray_cluster(tmp_path, environment) as jobs,
    ):
        _wait_for_two_nodes(jobs, environment)
        done = subprocess.run(
            [
                DESCENT,
                "submit",
                "--address",
                jobs,
                "workers=2",
                "epochs=3",
                "name=topology",
                f"output_dir={tmp_path / 'runs'}",
                f"tracking.uri={tracking}",
                "tracking.experiment=topology",
            ],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "head.log").read_text()
        assert "finished at step 76" in done.stdout
        run = json.loads((tmp_path / "runs" / "runs" / "topology" / "run.json").read_text())
        _check_run(tracking, run["run_id"])


def _wait_for_two_nodes(jobs: str, environment: dict[str, str]) -> None:
    import urllib.request

    def two() -> bool:
        request = urllib.request.Request(
            f"{jobs}/nodes?view=summary",
            headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"},
        )
        with urllib.request.urlopen(request, timeout=10) as reply:
            nodes = json.load(reply)["data"]["summary"]
        return sum(n["raylet"].get("state") == "ALIVE" for n in nodes) == 2

    until(two, "the second node")


def _check_run(tracking: str, run_id: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    nodes = json.loads(run.data.tags["descent.workers"])
    assert len(nodes) == 2
    assert len(set(nodes.values())) == 2, "both workers ran on one node"
    points = client.get_metric_history(run_id, "train/loss")
    assert sorted(p.step for p in points) == list(range(1, 77))
    assert run.data.metrics["eval/accuracy"] > 0.8
    assert {"config.yaml", "plots"} <= {a.path for a in client.list_artifacts(run_id)}
