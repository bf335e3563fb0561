"""A checkpoint is whole or it doesn't count."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner, Result

from descent.checkpoint.manifest import commit_checkpoint, partition, read_manifest
from descent.checkpoint.reader import newest_checkpoint, read_checkpoint, verify_checkpoint
from descent.checkpoint.retention import Retention, prune
from descent.checkpoint.writer import ShareWriter
from descent.cli.main import app
from descent.cluster.control.checkpoints import CheckpointCommitter
from descent.config.schema import Checkpoint
from descent.errors import CheckpointError
from descent.messages import ShareWritten

TENSORS = {
    "model/weight": torch.arange(12.0).view(3, 4),
    "model/bias": torch.randn(5, generator=torch.Generator().manual_seed(0)),
    "model/count": torch.tensor(7),
    "optimizer/weight/exp_avg": torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).bfloat16(),
}
SCALARS = {"evaluated": 3, "bad_steps": 0, "best": 0.1}


def write_shares(root: Path, step: int, world: int = 2, generation: int = 1) -> list[ShareWritten]:
    """Each rank's share, written by its own writer."""
    shares: list[ShareWritten] = []
    for rank in range(world):
        writer = ShareWriter(root, shares.append)
        writer.write(TENSORS, step=step, rank=rank, world_size=world, generation=generation, scalars=SCALARS)
        writer.wait_until_written()
    return shares


def make_checkpoint(root: Path, step: int, world: int = 2) -> Path:
    return commit_checkpoint(root, write_shares(root, step, world), run="r", config_sha256="c")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_what_any_number_of_ranks_wrote_is_read_by_one(tmp_path: Path, world: int) -> None:
    tensors, manifest = read_checkpoint(make_checkpoint(tmp_path, 3, world))
    assert same(tensors, TENSORS)
    assert (manifest.step, manifest.scalars) == (3, SCALARS)


@given(
    sizes=st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(0, 50), max_size=12),
    world=st.integers(1, 6),
)
def test_every_tensor_is_written_by_exactly_one_rank(sizes: dict[str, int], world: int) -> None:
    shares = partition(sizes, world)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[n] for n in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    make_checkpoint(root, 10)
    make_checkpoint(root, 20)
    return root


FILES = [
    "manifest.json",
    "model-00000-of-00002.safetensors",
    "model-00001-of-00002.safetensors",
    "optimizer-00001-of-00002.safetensors",
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
@given(
    name=st.sampled_from(FILES),
    how=st.sampled_from(["truncate", "flip", "delete", "empty", "swap"]),
    at=st.integers(0, 10**6),
    bit=st.integers(0, 7),
)
def test_any_damage_is_found_and_the_one_before_is_taken(
    pristine: Path, tmp_path: Path, name: str, how: str, at: int, bit: int
) -> None:
    root = tmp_path / "root"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(pristine, root)
    file = root / "step-00000020" / name
    whole = file.read_bytes()
    at %= len(whole)
    if how == "truncate":
        file.write_bytes(whole[:at])
    elif how == "flip":
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
    elif how == "delete":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.write_bytes((root / "step-00000020" / FILES[1 if name != FILES[1] else 2]).read_bytes())
    if name == "manifest.json" and how == "flip":
        with contextlib.suppress(ValueError):
            # A flipped bit of white space: the manifest says the same.
            if json.loads(file.read_bytes()) == json.loads(whole):
                return
    with pytest.raises(CheckpointError):
        read_checkpoint(file.parent)
    target, skipped = newest_checkpoint(root)
    assert target.name == "step-00000010"
    # Without a manifest the folder was never a checkpoint; otherwise the reason is given.
    assert len(skipped) == (0 if (name, how) == ("manifest.json", "delete") else 1)
    assert same(read_checkpoint(target)[0], TENSORS)


def boundaries(file: Path) -> list[int]:
    """Where one thing ends and the next begins: the header's length, the header, each tensor."""
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    entries = json.loads(whole[8 : 8 + header])
    ends = {8 + header + e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__"}
    return sorted({0, 8, 8 + header, *ends} - {len(whole)})


def test_cut_at_every_boundary(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path / "root")
    for name in FILES[1:]:
        file = tmp_path / "root" / "step-00000020" / name
        whole = file.read_bytes()
        for at in boundaries(file):
            for cut in {at, max(0, at - 1), at + 1}:
                file.write_bytes(whole[:cut])
                target, skipped = newest_checkpoint(tmp_path / "root")
                assert target.name == "step-00000010" and name in skipped[0]
        file.write_bytes(whole + b"more")
        assert newest_checkpoint(tmp_path / "root")[0].name == "step-00000010"
        file.write_bytes(whole)
    assert newest_checkpoint(tmp_path / "root")[0].name == "step-00000020"


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path: Path) -> None:
    for step, config in ((1, "c"), (2, "another")):
        shares = write_shares(tmp_path, step)
        commit_checkpoint(tmp_path, shares, run=f"of {config}", config_sha256=config)
    target, skipped = newest_checkpoint(tmp_path, "c")
    assert target.name == "step-00000001"
    assert "is of another run, 'of another', with another config" in skipped[0]


def test_a_step_that_is_written_again_replaces_what_was_there(tmp_path: Path) -> None:
    """As when a run has gone back behind it."""
    target = make_checkpoint(tmp_path, 5, world=2)
    assert make_checkpoint(tmp_path, 5, world=1) == target
    assert same(read_checkpoint(target)[0], TENSORS)


def edit(target: Path, **changes: object) -> None:
    path = target / "manifest.json"
    content = {**json.loads(path.read_text()), **changes}
    del content["sha256"]
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**content, "sha256": seal}))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "state.safetensors", "..", ""])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    target = make_checkpoint(tmp_path, 1)
    outside = tmp_path / "outside.safetensors"
    shutil.copy(target / FILES[1], outside)
    content = outside.read_bytes()
    entry = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "xxh3_128": xxhash.xxh128_hexdigest(content),
    }
    edit(target, files={name: entry})
    with pytest.raises(CheckpointError, match="not a valid manifest"):
        read_checkpoint(target)


FOREIGN = [
    {"format": 1},
    {"format": "1"},
    {"step": "1"},
    {"step": -1},
    {"step": True},
    {"files": []},
    {"files": {}},
    {"files": None},
    {"files": {FILES[1]: {}}},
    {"files": {FILES[1]: 3}},
    {"files": {FILES[1]: {"size": -1, "sha256": "0" * 64, "xxh3_128": "0" * 32}}},
    {"unknown": 1},
    {"scalars": 3},
    {"scalars": {"evaluated": "x"}},
    {"files": {FILES[1]: {"size": 1, "sha256": 5, "xxh3_128": "0" * 32}}},
    {"files": {FILES[1]: {"size": 1, "sha256": "0" * 64, "xxh3_128": "0" * 64}}},
    {"files": {FILES[1]: {"size": 1, "sha256": "0" * 64}}},
    {"files": {FILES[1]: {"size": 1 << 80, "sha256": "0" * 64, "xxh3_128": "0" * 32}}},
    {"time_ms": "yesterday"},
    {"time_ms": 1 << 80},
    {"run": 3},
    {"config_sha256": None},
    {"versions": {"torch": 2}},
    {"versions": []},
]


def test_the_thorough_look_compares_sha256_too(tmp_path: Path) -> None:
    target = make_checkpoint(tmp_path, 1)
    assert verify_checkpoint(target, thorough=True) == read_manifest(target)
    files = json.loads((target / "manifest.json").read_text())["files"]
    files[FILES[1]]["sha256"] = "0" * 64
    edit(target, files=files)
    assert verify_checkpoint(target).files == files
    with pytest.raises(CheckpointError, match=f"{FILES[1]}: its sha256 is not the manifest's"):
        verify_checkpoint(target, thorough=True)


@pytest.mark.parametrize("changes", FOREIGN, ids=str)
def test_a_foreign_manifest_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    target = make_checkpoint(tmp_path, 1)
    edit(target, **changes)
    with pytest.raises(CheckpointError):
        read_checkpoint(target)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        newest_checkpoint(tmp_path)


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3),
    )
)
def test_any_other_json_is_refused(pristine: Path, content: object) -> None:
    target = pristine.parent / "json"
    target.mkdir(exist_ok=True)
    (target / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        read_manifest(target)


def test_a_renamed_folder_does_not_pass_for_a_newer_step(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    shutil.copytree(tmp_path / "step-00000005", tmp_path / "step-00000009")
    target, skipped = newest_checkpoint(tmp_path)
    assert target.name == "step-00000005" and len(skipped) == 1


def test_before_the_commit_nothing_counts(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    shares = write_shares(tmp_path, 2)
    assert newest_checkpoint(tmp_path)[0].name == "step-00000001"
    (tmp_path / "step-00000002" / shares[1].files[0].name).unlink()
    with pytest.raises(CheckpointError, match="not there with"):
        commit_checkpoint(tmp_path, shares, run="r", config_sha256="c")
    assert newest_checkpoint(tmp_path)[0].name == "step-00000001"
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        newest_checkpoint(tmp_path / "nowhere")


def test_prune_keeps_the_newest_and_what_is_being_written(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 99_999_999)
    write_shares(tmp_path, 100_000_000)  # left over from a crash
    for step in (100_000_001, 100_000_002, 100_000_003):
        make_checkpoint(tmp_path, step)
    write_shares(tmp_path, 100_000_004)  # not committed yet
    (tmp_path / "notes").mkdir()
    prune(tmp_path, Retention(2))
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["notes", "step-100000002", "step-100000003", "step-100000004"]
    assert newest_checkpoint(tmp_path)[0].name == "step-100000003"


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        make_checkpoint(tmp_path, step)
    assert newest_checkpoint(tmp_path)[0].name == "step-100000000"
    prune(tmp_path, Retention(1))
    assert [p.name for p in tmp_path.iterdir()] == ["step-100000000"]


def test_a_disk_that_refuses_is_reported_in_the_part(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").write_text("a file where the folder should be")
    shares = write_shares(tmp_path, 1, world=1)
    assert shares[0].error is not None and "File exists" in shares[0].error


# --- one bad entry never blocks the rest ---


def spoil(root: Path) -> None:
    """Beside good checkpoints, everything that a folder may hold and that is none."""
    make_checkpoint(root, 30)
    edit(root / "step-00000030", time_ms="yesterday")
    make_checkpoint(root, 40)
    edit(root / "step-00000040", config_sha256="of another run")
    make_checkpoint(root, 50)
    (root / "step-00000050" / FILES[1]).write_bytes(b"short")
    (root / "step-00000060").mkdir()
    (root / "step-00000060" / "manifest.json").mkdir()
    (root / "step-00000061").mkdir()
    os.mkfifo(root / "step-00000061" / "manifest.json")
    (root / "step-00000062").mkdir()
    (root / "step-00000062" / "manifest.json").symlink_to("manifest.json")
    (root / "step-00000063").write_text("no folder")
    (root / f"step-{'9' * 200}").mkdir()
    (root / f"step-{'9' * 200}" / "manifest.json").write_text("{}")
    (root / "step-00000064").mkdir()
    (root / "step-00000064" / "manifest.json").write_text("[" * 100_000)


def test_whatever_else_lies_in_the_folder_is_named_and_passed_over(tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path, 20)
    spoil(tmp_path)
    target, skipped = newest_checkpoint(tmp_path, "c")
    assert target == good
    assert [next(s for s in (64, 50, 40, 30) if f"step-000000{s}" in line) for line in skipped] == [64, 50, 40, 30]


@pytest.mark.parametrize("config", ["c", None])
def test_what_can_not_be_used_takes_no_good_checkpoints_place(tmp_path: Path, config: str | None) -> None:
    """A newer one that is foreign or damaged must not be what is kept, and the only good one deleted."""
    make_checkpoint(tmp_path, 10)
    good = make_checkpoint(tmp_path, 20)
    spoil(tmp_path)
    pruned = prune(tmp_path, Retention(1), config_sha256=config)
    assert pruned.deleted == ["step-00000010"] and newest_checkpoint(tmp_path, "c")[0] == good
    for step in (30, 50, 64) if config is None else (30, 40, 50, 64):
        assert any(f"step-000000{step}" in line for line in pruned.skipped)
        assert (tmp_path / f"step-000000{step}").is_dir(), "left for a person to look into"


def test_after_going_back_the_steps_behind_count_no_more(tmp_path: Path) -> None:
    """The run passed over step 30 and has just committed step 20: that one is what it has."""
    for step in (10, 20, 30):
        make_checkpoint(tmp_path, step)
    assert prune(tmp_path, Retention(1), newest_step=20).deleted == ["step-00000010"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]


def test_the_controller_passes_over_what_the_workers_could_not_use(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make_checkpoint(tmp_path, step)
    newest = tmp_path / "step-00000030"
    committer = CheckpointCommitter(tmp_path, "r", "c", Checkpoint(), newest)
    committer.reject_newest("not of this run")
    assert committer.return_to_newest() == ["not of this run"] and committer.step == 20
    committer.reject_newest("nor this one")
    assert committer.return_to_newest() == ["not of this run", "nor this one"] and committer.step == 10
    committer.reject_newest("nor this")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint.*nor this"):
        committer.return_to_newest()
    committer.close()


def test_a_tensor_that_is_in_two_files_is_refused(tmp_path: Path) -> None:
    target = make_checkpoint(tmp_path, 1)
    one, two = sorted(target.glob("model-*"))
    shutil.copy(one, two)
    files = json.loads((target / "manifest.json").read_text())["files"]
    edit(target, files={**files, two.name: files[one.name]})
    with pytest.raises(CheckpointError, match="is in another file, too"):
        read_checkpoint(target)


def test_ls_verify_prune_and_export_pass_over_what_is_bad(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "root", 10)
    make_checkpoint(tmp_path / "root", 20)
    spoil(tmp_path / "root")

    def descent(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["checkpoint", *arguments])

    listed = json.loads(descent("ls", str(tmp_path / "root"), "--json").stdout)
    assert [row["step"] for row in listed] == [64, 50, 40, 30, 20, 10]
    assert [row["step"] for row in listed if "error" in row] == [64, 30]
    assert descent("ls", str(tmp_path / "root")).exit_code == 0
    verified = descent("verify", str(tmp_path / "root"))
    assert verified.exit_code == 1 and verified.stdout.count("good") == 3 and verified.stdout.count("BAD") == 3
    shutil.rmtree(tmp_path / "root" / "step-00000040")
    exported = descent("export", str(tmp_path / "root"), str(tmp_path / "out.safetensors"))
    assert exported.exit_code == 0 and "passed over" in exported.stderr and "of step-00000020" in exported.stdout
    again = descent("export", str(tmp_path / "root"), str(tmp_path / "out.safetensors"))
    assert again.exit_code == 2 and "is there already" in again.stderr
    pruned = descent("prune", str(tmp_path / "root"), "--keep-last", "1")
    assert "deleted: step-00000010" in pruned.stdout and pruned.stdout.count("passed over") == 3
