"""A checkpoint's run goes on with other replicas, in another number; each reads its share of it."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from xxhash import xxh128_hexdigest

from descent.checkpoint.manifest import MANIFEST, commit_checkpoint, read_manifest
from descent.checkpoint.reader import files_of_rank, verify_checkpoint
from tests.distributed.led import RUN, LedRun, assert_metrics_after, shares_of
from tests.distributed.replicas import Case, Crew, Injected, Report, fail
from tests.distributed.test_equal_for_any_world import MODELS


def saved(pool: Crew, case: Case, before: int, *steps: int) -> tuple[list[Report], list[Path]]:
    """The whole run by `before` replicas, and its checkpoints of these steps."""
    whole = pool.train(case, before)
    root = case.run_dir / "checkpoints"
    return whole, [commit_checkpoint(root, shares_of(whole, step), run="r", config_sha256="0" * 64) for step in steps]


def resumed(pool: Crew, case: Case, target: Path, after: int, *faults: Injected) -> LedRun:
    run = LedRun(pool, case, resumed=target)
    run.start(after, *faults)
    return run


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 1), (1, 4)])
def test_resumed_from_a_checkpoint_by_other_replicas(
    pool: Crew, tmp_path: Path, before: int, after: int, schedule: str
) -> None:
    case = Case.of([*RUN, "checkpoint.every=5", f"schedule={schedule}"], tmp_path)
    whole, (target,) = saved(pool, replace(case, run_dir=tmp_path / "whole"), before, 10)
    run = resumed(pool, case, target, after)
    last = run.finish()
    assert len(run.formed) == 1 and run.group.memberships[1]["w0"].restore_from == str(target)
    assert last.state_sha256 == whole[0].sha256
    assert_metrics_after(run, whole[0], 10)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_every_model_is_resumed_unchanged(pool: Crew, tmp_path: Path, model: list[str]) -> None:
    common = ["batch.size=24", "steps=8", "epochs=null", "checkpoint.every=4", "reduction=exact"]
    case = Case.of([*model, *common], tmp_path, 4)
    whole, (target,) = saved(pool, replace(case, run_dir=tmp_path / "whole"), 2, 4)
    run = resumed(pool, case, target, 3)
    last = run.finish()
    assert (last.step, last.state_sha256) == (8, whole[0].sha256)
    assert_metrics_after(run, whole[0], 4)


def test_each_rank_reads_its_files_and_all_have_the_state(pool: Crew, tmp_path: Path) -> None:
    """The state after the exchange, before any step, is that of one who reads everything."""
    case = Case.of([*RUN, "checkpoint.every=5"], tmp_path)
    _, (target,) = saved(pool, replace(case, run_dir=tmp_path / "whole"), 3, 10)
    manifest = read_manifest(target)
    for world in (1, 2, 5, 20):
        shares = [files_of_rank(manifest, rank, world) for rank in range(world)]
        assert sorted(name for share in shares for name in share) == sorted(manifest.files)
        assert all(shares) or len(manifest.files) < world
    states = set()
    for world in (1, 3):
        replicas = pool.build(case, world)
        pool.form(case, replicas, tuple(range(1, world)), restore_from=target, save_only=True)
        reports = [replica.next_report() for replica in replicas]
        assert [(t.state, t.step) for t in reports] == [("paused", 10)] * world, reports
        states |= {t.sha256 for t in reports}
        pool.give(replicas)
    assert len(states) == 1


@pytest.mark.parametrize("harm", ["flip", "delete", "truncate"])
def test_a_share_that_can_not_be_read_takes_all_back_to_the_checkpoint_before(
    pool: Crew, tmp_path: Path, harm: str
) -> None:
    case = Case.of([*RUN, "checkpoint.every=5"], tmp_path)
    whole, (_, target) = saved(pool, replace(case, run_dir=tmp_path / "whole"), 2, 5, 10)
    victim = target / files_of_rank(read_manifest(target), 1, 2)[0]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    if harm == "delete":
        victim.unlink()
    else:
        victim.write_bytes(content if harm == "flip" else content[:-1])
    run = resumed(pool, case, target, 2)
    last = run.finish()
    assert [i.worker for i in run.kept.incidents if i.kind == "restore failed"] == ["w1"]
    skipped = [line for line in run.kept.notes if line.startswith("skipped checkpoint")]
    assert len(skipped) == 1 and victim.name in skipped[0]
    assert last.state_sha256 == whole[0].sha256
    assert_metrics_after(run, whole[0], 5)


def test_a_checkpoint_that_can_not_even_be_looked_at_is_an_outcome_too(pool: Crew, tmp_path: Path) -> None:
    case = Case.of([*RUN, "checkpoint.every=5"], tmp_path)
    _, (target,) = saved(pool, replace(case, run_dir=tmp_path / "whole"), 2, 10)
    os.rename(target / MANIFEST, target / "elsewhere")
    replicas = pool.build(case, 3)
    pool.form(case, replicas, (1, 2), restore_from=target)
    reports = [replica.next_report() for replica in replicas]
    assert [t.state for t in reports] == ["broken"] * 3 and all(t.step == 0 for t in reports)
    assert any("no complete checkpoint" in t.error for t in reports)
    pool.give(replicas)


def test_a_member_that_dies_in_the_exchange_is_survived(pool: Crew, tmp_path: Path) -> None:
    case = Case.of([*RUN, "checkpoint.every=5"], tmp_path)
    whole, (target,) = saved(pool, replace(case, run_dir=tmp_path / "whole"), 2, 10)
    run = resumed(pool, case, target, 3, fail(worker=0).at(step=1, phase="receive"))
    last = run.finish()
    assert run.lost == 1 and last.state_sha256 == whole[0].sha256


def reseal(target: Path, change: Callable[[dict[str, Tensor]], None], group: str) -> None:
    """Change the tensors in the files of a group, and make the manifest fit: the checkpoint verifies as before."""
    content = json.loads((target / MANIFEST).read_text())
    del content["sha256"]
    for name, entry in content["files"].items():
        if name.startswith(group):
            tensors = {n: t.clone() for n, t in load_file(target / name).items()}
            change(tensors)
            save_file(tensors, target / name)
            raw = (target / name).read_bytes()
            entry |= {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest(), "xxh3_128": xxh128_hexdigest(raw)}
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (target / MANIFEST).write_text(json.dumps({**content, "sha256": seal}))
    verify_checkpoint(target, thorough=True)


def _first(tensors: dict[str, Tensor], new: Callable[[Tensor], Tensor]) -> None:
    name = max(sorted(tensors), key=lambda n: tensors[n].dim())
    tensors[name] = new(tensors[name])


def _take_one(tensors: dict[str, Tensor]) -> None:
    del tensors[max(tensors)]


def _take_all_of_one(tensors: dict[str, Tensor]) -> None:
    parameter = max(tensors).rpartition("/")[0]
    for name in [name for name in tensors if name.rpartition("/")[0] == parameter]:
        del tensors[name]


FOREIGN: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "dtype": ("model", lambda t: _first(t, lambda x: x.double()), r"is float64 .*, this run's is float32"),
    "shape": ("model", lambda t: _first(t, lambda x: x[:-1].clone()), r"is float32 \[.*, this run's is float32"),
    "unknown name": ("model", lambda t: t.update(other=torch.zeros(1)), r"no model/other"),
    "missing": ("model", _take_one, r"is missing"),
    "moments of another shape": ("optimizer", lambda t: _first(t, lambda x: x[:-1].clone()), r"its parameter float32"),
    "moments of nobody": ("optimizer", lambda t: t.update({"other/exp_avg": torch.zeros(1)}), r"no parameter of this"),
    "a moment missing": ("optimizer", _take_one, r"optimizer/.* is missing"),
    "a parameter's moments missing": ("optimizer", _take_all_of_one, r"the optimizer's state of a parameter"),
    "averages missing": ("ema", _take_one, r"is missing"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_sealed_checkpoint_that_is_not_of_this_run_is_named_by_its_readers(
    pool: Crew, tmp_path: Path, kind: str
) -> None:
    case = Case.of([*RUN, "checkpoint.every=5"], tmp_path)
    _, (target,) = saved(pool, replace(case, run_dir=tmp_path / "whole"), 1, 10)
    group, change, words = FOREIGN[kind]
    reseal(target, change, group)
    replicas = pool.build(case, 2)
    pool.form(case, replicas, (1,), restore_from=target)
    reports = [replica.next_report() for replica in replicas]
    assert [t.state for t in reports] == ["broken"] * 2
    notices = [n for t in reports for n in t.notices if n.kind == "checkpoint unusable"]
    assert notices and all(str(target) in n.detail and re.search(words, n.detail) for n in notices)
    pool.give(replicas)
