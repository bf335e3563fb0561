"""A run's name and its result: what tells runs apart, and that nothing is lost between run, file and JSON."""

import json
from dataclasses import fields
from pathlib import Path

from descent.cluster.run.announcement import name_of
from descent.cluster.run.result import RunResult
from descent.cluster.run.train import overrides_of
from descent.config import RunConfig, compose


def test_names_tell_runs_apart_within_what_mlflows_tables_show() -> None:
    targets = ["model._target_=nets.wide.Net", "data.train._target_=my_data.Wine", "trusted_modules=[nets,my_data]"]
    custom = compose(["model=custom", "data=custom", *targets])
    names = {name_of(custom) for _ in range(20)}
    assert len({name[:25] for name in names}) == 20
    assert all(name.endswith("-wine-net") for name in names)
    assert name_of(compose(["experiment=digits"])).endswith("-digits-mlp")
    assert name_of(compose(["name=mine"])) == "mine"
    assert all(compose([f"name={name}"]).config.name == name for name in names)  # fit for a folder


def test_a_result_survives_the_runs_file() -> None:
    result = RunResult(
        state="FINISHED",
        step=7,
        run_dir=Path("/runs/a"),
        metrics={"eval/loss": 0.5},
        best={"eval/loss": 0.25},
        recovery_s=(0.5, 1.5),
        incidents=2,
        incidents_by_kind={"worker lost": 2},
        model_uri="runs:/abc/a",
    )
    saved = {"state": "FINISHED", "result": json.loads(json.dumps(result.to_json()))}
    assert RunResult.from_json(Path("/runs/a"), saved) == result
    printed = json.loads(json.dumps(result.to_dict()))
    assert (printed["eval/loss"], printed["best eval/loss"], printed["run_dir"]) == (0.5, 0.25, "/runs/a")
    # a file of an earlier version: what it holds, and defaults for the rest
    old = RunResult.from_json(Path("/runs/a"), {"state": "FINISHED", "run_id": "abc", "plan": {"total_steps": 7}})
    assert (old.step, old.run_id, old.exit_code, old.name) == (7, "abc", 0, "a")
    assert {field.name for field in fields(RunResult)} >= {"state", "step", "metrics", "best", "checkpoint"}


def test_a_mapping_composes_to_what_the_same_overrides_do() -> None:
    tree = {
        "experiment": "digits",
        "optimizer": {"lr": 0.25, "betas": [0.8, 0.9]},
        "clip.norm": 1.5,
        "workers": {"min": 1, "max": 2},
        "checkpoint": {"dir": "/a path/with, odd: [signs] and 'quotes'"},
        "compile": False,
        "tracking": {"uri": None},
        "trusted_modules": ["my_nets", "my_data"],
    }
    config = compose(overrides_of(tree)).config
    assert isinstance(config, RunConfig)
    assert (config.optimizer["lr"], config.optimizer["betas"], config.clip.norm) == (0.25, [0.8, 0.9], 1.5)
    assert config.workers.min == 1 and config.workers.max == 2  # type: ignore[union-attr]
    assert config.checkpoint.dir == "/a path/with, odd: [signs] and 'quotes'"
    assert config.trusted_modules == ["my_nets", "my_data"] and config.tracking.uri is None
