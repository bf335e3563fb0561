"""A run's folder: one process at a time, resumed from what its file says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from descent.checkpoint.manifest import checkpoint_root, commit_checkpoint
from descent.cluster.control.control_file import STATUS_FILE
from descent.cluster.record import run_log
from descent.cluster.run.lock import RunLock, is_locked
from descent.cluster.run.resume import config_sha256, resume, schedule_change, with_implied_length
from descent.config import Composed, compose
from descent.errors import CheckpointError, ConfigError
from descent.messages import ShareWritten

HOLD = """
import sys
from pathlib import Path
from descent.cluster.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]), "name=held")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_use_is_refused_with_the_process_that_uses_it(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        assert is_locked(tmp_path)
        with pytest.raises(ConfigError, match=rf"^resume=held: the run is being trained by process {holder.pid} on "):
            RunLock(tmp_path, "resume=held")
    finally:
        holder.kill()  # no chance to let go of it: the kernel does
        holder.communicate()
    assert not is_locked(tmp_path)
    lock = RunLock(tmp_path, "resume=held")
    assert is_locked(tmp_path)
    lock.release()
    assert not is_locked(tmp_path)


def saved_run(folder: Path, composed: Composed, overrides: list[str] | None, state: str | None = None) -> Path:
    """A run on disk as its recorder leaves it: the run's file and a checkpoint of step 40, without tensors."""
    run_dir = folder / "runs" / "first"
    run_dir.mkdir(parents=True)
    sha256 = config_sha256(composed.config)
    content = {
        "name": "first",
        "run_id": "abc",
        "tracking_uri": None,
        "overrides": overrides,
        "config_dirs": [],
        "config": composed.config.to_dict(),
        "config_sha256": sha256,
        "slots": 1,
        "plan": {"total_steps": 40},
        **({"state": state, "state_sha256": "f" * 64} if state else {}),
    }
    run_log.write_run_file(run_dir, content)
    written = ShareWritten(40, 0, 1, 1, files=(_file(checkpoint_root(run_dir, None)),))
    commit_checkpoint(checkpoint_root(run_dir, None), [written], run="first", config_sha256=sha256, time_ms=0)
    return run_dir


def _file(root: Path):
    import hashlib

    import xxhash

    from descent.messages import FileWritten

    content = b"not read here"
    (root / "step-00000040").mkdir(parents=True)
    (root / "step-00000040" / "model-00000-of-00001.safetensors").write_bytes(content)
    return FileWritten(
        "model-00000-of-00001.safetensors",
        len(content),
        hashlib.sha256(content).hexdigest(),
        xxhash.xxh3_128(content).hexdigest(),
    )


def resumed(folder: Path, *overrides: str):
    composed = compose(with_implied_length([f"output_dir={folder}", "resume=first", *overrides]))
    return resume(composed, folder / "runs" / "first")


def test_a_run_that_died_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    run_dir = saved_run(tmp_path, compose(["seed=3"]), ["seed=3"])
    shutil.rmtree(checkpoint_root(run_dir, None))
    status_file = run_dir / STATUS_FILE
    status_file.write_text(json.dumps({"checkpoint": None}))
    composed, old = resumed(tmp_path)
    assert (composed.config.seed, old.checkpoint, old.step, old.died) == (3, None, 0, True)
    # Where there was one, or perhaps was, its absence is nothing to pass over.
    for status in ({"checkpoint": 20}, {}, None):
        status_file.unlink() if status is None else status_file.write_text(json.dumps(status))
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            resumed(tmp_path)


def test_a_run_that_has_ended_and_has_no_checkpoint_is_refused(tmp_path: Path) -> None:
    run_dir = saved_run(tmp_path, compose([]), [], state="KILLED")
    assert not resumed(tmp_path)[1].died
    shutil.rmtree(checkpoint_root(run_dir, None))
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        resumed(tmp_path)


def test_a_new_length_needs_no_word_about_the_unit_of_the_old_one(tmp_path: Path) -> None:
    saved_run(tmp_path, compose(["epochs=2", "batch.size=32"]), ["epochs=2", "batch.size=32"], "FINISHED")
    composed, old = resumed(tmp_path, "steps=60")
    assert (composed.config.steps, composed.config.epochs, composed.config.batch.size) == (60, None, 32)
    assert old.step == 40 and not old.same_length
    composed, old = resumed(tmp_path)
    assert old.same_length and old.finished is not None and old.already_finished().state == "FINISHED"
    with pytest.raises(ConfigError, match="steps=null and epochs=null"):
        resumed(tmp_path, "steps=null")


def test_a_run_that_was_made_from_a_whole_config_goes_on_with_single_keys_changed(tmp_path: Path) -> None:
    saved_run(tmp_path, compose(["steps=40", "epochs=null", "model.width=9"]), None)
    composed, _ = resumed(tmp_path, "steps=60", "workers=2")
    assert (composed.config.steps, composed.config.workers) == (60, 2)
    assert composed.config.model["width"] == 9
    with pytest.raises(CheckpointError, match=r"seed=5 \(the run has 0\)"):
        resumed(tmp_path, "seed=5")
    with pytest.raises(ConfigError, match="made from a RunConfig"):
        resumed(tmp_path, "optimizer=sgd")


def test_a_longer_resume_says_what_it_does_to_the_learning_rate(tmp_path: Path) -> None:
    before = ["steps=40", "epochs=null", "optimizer.lr=0.05", "schedule=cosine"]
    saved_run(tmp_path, compose(before), before)
    composed, old = resumed(tmp_path, "steps=80")
    line = schedule_change(composed.config, old, 80)
    # cosine: at the old end 0, in the middle of the new length half of the base rate
    assert line is not None and "at step 41 the learning rate is 0.02500 where it would have been 0;" in line
    assert "schedule.total_steps=40 keeps" in line
    composed, old = resumed(tmp_path, "steps=80", "schedule.total_steps=40")
    assert schedule_change(composed.config, old, 80) is None
    with pytest.raises(CheckpointError, match=r"schedule.total_steps=50 \(the run has None\)"):
        resumed(tmp_path, "steps=80", "schedule.total_steps=50")


def test_another_runs_damaged_file_does_not_stop_a_search(tmp_path: Path) -> None:
    saved_run(tmp_path, compose(["steps=40", "epochs=null"]), ["steps=40", "epochs=null"])
    broken = tmp_path / "runs" / "a-broken"
    broken.mkdir()
    (broken / "run.json").write_bytes(b"\xff\x00")
    assert run_log.find_run("abc", tmp_path) == tmp_path / "runs" / "first"  # by its MLflow id
    with pytest.raises(CheckpointError, match=r"there are: first; passed over, because their run.json .*: a-broken"):
        run_log.find_run("nothing", tmp_path)
    with pytest.raises(CheckpointError, match="a-broken: not the folder of a run"):
        run_log.read_run_file(run_log.find_run("a-broken", tmp_path))
