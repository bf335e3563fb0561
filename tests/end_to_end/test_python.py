"""`descent.train` and `descent.load` from a script of a project that has a package named `service` of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

NETS = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=8):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

class Curve:
    def on_step(self, run, log):
        log.scalar("twice", 2 * run.metrics["train/loss"])

    def on_evaluate(self, run, log):
        log.table("seen", [dict(run.metrics)])
"""
SCRIPT = """
import json
import sys
import descent

heavy = sorted({"torch", "ray", "mlflow", "numpy", "hydra", "pydantic"} & set(sys.modules))
overrides = {
    "model": "custom", "model._target_": "service.nets.Net", "+model.width": 16, "trusted_modules": ["service"],
    "epochs": None, "steps": 4, "evaluate": {"every": 2}, "workers": 1, "tracking": {"system_metrics": False},
}
if __name__ == "__main__":
    first = descent.train({**overrides, "name": "first", "+observers.curve": "service.nets.Curve"})

    import ray
    import torch
    model = descent.load("first", trusted_modules=["service"])
    earlier = descent.load(first.run_dir, step=first.best_step, trusted_modules=["service"])
    again = descent.train({"resume": "first", "trusted_modules": ["service"]})
    connected_after_first = ray.is_initialized()

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    shared = descent.train({**overrides, "name": "shared"})
    still_connected = ray.is_initialized()
    ray.shutdown()
    further = descent.train(["resume=first", "steps=6", "trusted_modules=[service]"])

    refusals = []
    for call in (
        lambda: descent.train(["optimzer=sgd"]),
        lambda: descent.train("experiment=digits"),
        lambda: descent.load("first"),
        lambda: descent.load("second"),
        lambda: descent.load("first", step=99),
    ):
        try:
            call()
        except descent.DescentError as error:
            refusals.append(f"{type(error).__name__}: {error}")
    print(json.dumps({
        "heavy": heavy,
        "version": descent.__version__,
        "first": first.to_dict(),
        "exit_code": first.exit_code,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": model.training,
        "outputs": list(model(torch.zeros(3, 1, 8, 8)).shape),
        "class": type(model).__module__,
        "again": again.to_dict(),
        "connected": [connected_after_first, still_connected],
        "shared": shared.to_dict(),
        "further": further.to_dict(),
        "refusals": refusals,
    }))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script printed: three runs of a few steps and what was refused."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "service").mkdir()
    (folder / "service" / "__init__.py").touch()
    (folder / "service" / "nets.py").write_text(NETS)
    (folder / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_importing_descent_loads_nothing_heavy(said: dict[str, Any]) -> None:
    assert said["heavy"] == []
    assert said["version"][0].isdigit()


def test_a_run_says_what_came_of_it(said: dict[str, Any]) -> None:
    first = said["first"]
    assert (first["state"], first["step"], said["exit_code"]) == ("FINISHED", 4, 0)
    assert first["best eval/loss"] <= first["eval/loss"]
    assert Path(first["checkpoint"]).name == "step-00000004"
    assert first["best_step"] in (2, 4) and Path(first["best_checkpoint"]).is_dir()
    assert len(first["state_sha256"]) == 64 and first["run_id"] and not first["already_finished"]


def test_the_model_of_a_run_comes_with_its_weights(said: dict[str, Any]) -> None:
    assert said["class"] == "service.nets"  # the user's own package of that name
    assert said["parameters"] == 64 * 16 + 16 + 16 * 10 + 10
    assert said["outputs"] == [3, 10] and said["training"] is False


def test_a_connection_to_ray_is_shared_and_left_open(said: dict[str, Any]) -> None:
    assert said["connected"] == [False, True]
    assert said["shared"]["state"] == "FINISHED"
    assert said["shared"]["state_sha256"] == said["first"]["state_sha256"]


def test_a_finished_run_is_left_as_it_is_and_goes_further_when_asked(said: dict[str, Any]) -> None:
    assert said["again"] == {**said["first"], "already_finished": True}
    assert (said["further"]["step"], said["further"]["run_id"]) == (6, said["first"]["run_id"])


def test_what_an_observer_says_stands_beside_the_runs_metrics_once_for_each_step(said: dict[str, Any]) -> None:
    client, run_id = MlflowClient(said["further"]["tracking_uri"]), said["first"]["run_id"]
    losses, twice = (client.get_metric_history(run_id, name) for name in ("train/loss", "curve/twice"))
    assert [(p.step, p.value) for p in twice] == [(p.step, 2 * p.value) for p in losses]
    assert [p.step for p in twice] == [1, 2, 3, 4, 5, 6]  # over a resume
    steps = {a.path for a in client.list_artifacts(run_id, "curve/seen")}
    assert {f"curve/seen/step-{step:06d}.csv" for step in (2, 4, 6)} <= steps


def test_refusals_are_errors_of_descent(said: dict[str, Any]) -> None:
    typo, text, untrusted, unknown, step = said["refusals"]
    assert typo.startswith("ConfigError: override 'optimzer=sgd': there is no key or group")
    assert text.startswith("ConfigError: config='experiment=digits': overrides are a list of texts")
    assert untrusted.startswith("ConfigError: ") and "service" in untrusted
    assert unknown.startswith("CheckpointError: run=second: no run of that id, name or path")
    assert step.startswith("CheckpointError: step=99: first has no checkpoint of this step")
