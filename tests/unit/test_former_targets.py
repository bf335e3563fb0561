"""Runs that were made when the package was called `service` still resume, and still serve chaos and init_from."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import xxhash

from descent.checkpoint.manifest import MANIFEST, checkpoint_root, commit_checkpoint
from descent.cluster.chaos.comparison import of_run
from descent.cluster.record import run_log
from descent.cluster.run.resume import find_weights, resume, with_implied_length
from descent.config import build, compose, recompose, resolve_target
from descent.config.former_targets import current_target, with_current_targets
from descent.config.public_classes import DESCENT_CLASSES
from descent.errors import CheckpointError
from descent.messages import FileWritten, ShareWritten

FORMER: dict[str, Any] = {
    "name": "old",
    "run_id": "abc",
    "tracking_uri": None,
    "overrides": [
        "name=old",
        "steps=40",
        "epochs=null",
        "workers=1",
        "optimizer=muon",
        "schedule._target_=service.training.schedules.Cosine",
        "checkpoint.every=20",
        "slots=2",
    ],
    "config_dirs": [],
    "config": {
        "name": "old",
        "output_dir": ".descent",
        "steps": 40,
        "epochs": None,
        "seed": 0,
        "model": {
            "_target_": "service.models.mlp.MLP",
            "input_shape": None,
            "num_outputs": None,
            "depth": 2,
            "width": 128,
            "activation": "relu",
            "init": "kaiming_normal",
            "init_std": None,
            "norm": None,
            "residual": False,
            "dropout": 0.0,
        },
        "data": {
            "name": "digits",
            "train": {"_target_": "service.data.digits.Digits", "split": "train", "holdout": 0.1, "seed": 0},
            "evaluate": {"_target_": "service.data.digits.Digits", "split": "evaluate", "holdout": 0.1, "seed": 0},
            "holdout": 0.1,
            "test": 0.0,
            "on_error": "fail",
            "cache": {"dir": None, "gb": 20.0},
        },
        "loss": {"_target_": "torch.nn.CrossEntropyLoss", "label_smoothing": 0.0},
        "optimizer": {
            "_target_": "service.training.optimizers.MuonWithAdamW",
            "lr": 0.002,
            "momentum": 0.95,
            "nesterov": True,
            "ns_steps": 5,
            "adjust_lr_fn": "match_rms_adamw",
            "betas": [0.9, 0.95],
            "eps": 1e-08,
            "weight_decay": 0.1,
            "decay_norm_and_bias": False,
            "groups": [],
        },
        "schedule": {
            "_target_": "service.training.schedules.Cosine",
            "min_multiplier": 0.0,
            "warmup_steps": 0,
            "total_steps": None,
        },
        "batch": {"size": 64, "micro_size": "auto"},
        "precision": "fp32",
        "clip": {"norm": None, "value": None},
        "compile": False,
        "ema": {"decay": None},
        "workers": 1,
        "spares": 0,
        "slots": 2,
        "reduction": "exact",
        "compress": None,
        "sentinel_every": 100,
        "device": "auto",
        "resources": {"cpus": 1.0, "gpus": "auto"},
        "evaluate": {"every": "epoch", "batch_size": 256},
        "checkpoint": {
            "dir": None,
            "every": 20,
            "share": 0.01,
            "keep_last": 2,
            "keep_every": None,
            "keep_best": None,
            "required": False,
        },
        "tracking": {"uri": None, "experiment": "descent", "every": 1, "system_metrics": True},
        "diagnostics": {"every": 10},
        "regroup": {"heartbeat_s": 10.0, "stall_s": 300.0, "wait_s": 60.0, "max_failures": 8, "max_bad_steps": 10},
        "straggler": {"deal": True, "factor": 1.5, "after_s": 30.0, "replace": False},
        "chaos": {
            "faults": 0,
            "seed": 0,
            "every_s": 5.0,
            "kinds": {"kill": 4.0, "stop": 1.0, "slow": 1.0, "nan": 2.0, "partition": 2.0, "kill_in_save": 1.0},
        },
        "ray": {"address": None},
        "trusted_modules": [],
        "init_from": None,
        "init_strict": True,
        "resume": None,
    },
    "config_sha256": "a6ce220b9cfdc02853c3954d67cf8c0c18252832f16ec40cc60ea679f8b19929",
    "slots": 2,
    "plan": {
        "total_steps": 40,
        "batch_size": 64,
        "num_samples": 1617,
        "num_evaluation": 180,
        "steps_per_epoch": 26,
        "slots": 2,
        "min_workers": 1,
        "max_workers": 1,
        "micro_size": 32,
        "nominal": 64.0,
        "threads": 1,
        "device": "cpu",
        "gpus": 0.0,
        "num_parameters": 26122,
        "changing_buffers": [],
        "unused_parameters": False,
        "draws_elsewhere": False,
    },
    "state": "FINISHED",
    "state_sha256": "7fc07177dbf6fe1a3632a42985bfd0c362e21c7ad8cd2ab227a4403b57f9e3a0",
}
"""run.json as the former version wrote it."""


@pytest.fixture
def former(tmp_path: Path) -> Path:
    """The folder `output_dir` with a former run and its checkpoint, whose manifest has the former hash of the config."""
    run_dir = tmp_path / "runs" / "old"
    run_dir.mkdir(parents=True)
    (run_dir / run_log.RUN_FILE).write_text(json.dumps(FORMER))
    root, name, content = checkpoint_root(run_dir, None), "model-00000-of-00001.safetensors", b"not read here"
    (root / "step-00000040").mkdir(parents=True)
    (root / "step-00000040" / name).write_bytes(content)
    sha256, xxh3 = hashlib.sha256(content).hexdigest(), xxhash.xxh3_128(content).hexdigest()
    written = ShareWritten(40, 0, 1, 1, files=(FileWritten(name, len(content), sha256, xxh3),))
    commit_checkpoint(root, [written], run="old", config_sha256=FORMER["config_sha256"], time_ms=0)
    return tmp_path


def resumed(folder: Path, *overrides: str):
    composed = compose(with_implied_length([f"output_dir={folder}", "resume=old", *overrides]))
    return resume(composed, folder / "runs" / "old")


def test_a_former_run_resumes_with_the_targets_of_today(former: Path) -> None:
    composed, found = resumed(former, "steps=60")
    assert found.step == 40 and found.config_sha256 == FORMER["config_sha256"]
    config = composed.config
    assert config.model["_target_"] == "descent.models.mlp.MLP"
    assert config.optimizer["_target_"] == "descent.optim.optimizers.MuonWithAdamW"
    # this one is named by an override of the run, the others by its config groups
    assert config.schedule["_target_"] == "descent.optim.schedules.Cosine"
    assert build({**config.schedule, "total_steps": 60}, (), "schedule")(0) == 1.0
    with pytest.raises(CheckpointError, match=r"seed=3 \(the run has 0\)"):
        resumed(former, "seed=3")


def test_a_former_key_is_read_and_may_still_be_typed(former: Path, tmp_path: Path) -> None:
    assert resumed(former)[0].config.straggler.balance is True
    assert resumed(former, "straggler.deal=false")[0].config.straggler.balance is False
    assert compose(["straggler.deal=false"]).config == compose(["straggler.balance=false"]).config
    assert recompose({**FORMER["config"], "straggler": {"deal": False}}).straggler.balance is False
    groups = tmp_path / "groups" / "experiment"
    groups.mkdir(parents=True)
    (groups / "mine.yaml").write_text("# @package _global_\nstraggler: {deal: false}\n")
    assert compose(["experiment=mine"], [str(groups.parent)]).config.straggler.balance is False


def test_a_former_target_may_still_be_typed(former: Path) -> None:
    composed, _ = resumed(former, "schedule._target_=service.training.schedules.Cosine")
    assert composed.config.schedule["_target_"] == "descent.optim.schedules.Cosine"


def test_a_checkpoint_of_a_former_run_is_resumed_by_its_own_folder(former: Path) -> None:
    folder = checkpoint_root(former / "runs" / "old", None) / "step-00000040"
    assert (folder / MANIFEST).is_file()
    composed = compose([f"output_dir={former}", f"resume={folder}"])
    assert resume(composed, former / "runs" / "old")[1].step == 40


def test_a_former_run_serves_init_from(former: Path) -> None:
    config = compose([f"output_dir={former}", "init_from=old"]).config
    assert str(find_weights(config)).endswith("step-00000040")


def test_a_former_run_is_repeated_under_chaos(former: Path) -> None:
    reference, composed = of_run("old", ["workers=2", f"output_dir={former}"], former)
    assert reference.state_sha256 == FORMER["state_sha256"]
    assert composed.config.optimizer["_target_"] == "descent.optim.optimizers.MuonWithAdamW"
    assert composed.config.slots == 2


def test_every_former_path_of_a_class_leads_to_the_class_of_today() -> None:
    formers = {
        "descent.optim.": "service.training.",
        "descent.models.": "service.models.",
        "descent.data.": "service.data.",
    }
    for kind, paths in DESCENT_CLASSES.items():
        if kind in ("task", "sampler"):  # there were none
            continue
        for path in paths:
            package = next(p for p in formers if path.startswith(p))
            assert current_target(path.replace(package, formers[package], 1)) == path
    assert resolve_target(current_target("service.training.muon.MuonWithAdamW"), (), "optimizer._target_")


def test_only_targets_are_translated() -> None:
    tree = {"a": ["service.data.x.Y", {"_target_": "service.data.x.Y", "b": 1}], "_target_": "services.data.x.Y"}
    before = copy.deepcopy(tree)
    assert with_current_targets(tree) == {
        "a": ["service.data.x.Y", {"_target_": "descent.data.x.Y", "b": 1}],
        "_target_": "services.data.x.Y",
    }
    assert tree == before
