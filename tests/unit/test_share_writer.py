"""A share holds the state as it was when it was written, whatever happens afterwards."""

import hashlib
import json
import math
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from descent.checkpoint.manifest import commit_checkpoint
from descent.checkpoint.reader import read_checkpoint
from descent.checkpoint.safetensors_file import layout, tensors_in
from descent.checkpoint.writer import ShareWriter, _duty
from descent.messages import ShareWritten
from descent.storage.direct_io import BLOCK

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
]
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=8))
def test_the_file_that_is_laid_out_is_the_librarys(
    drawn: dict[str, tuple[list[int], torch.dtype]],
) -> None:
    tensors = {n: torch.randint(0, 2, shape).to(dtype) for n, (shape, dtype) in drawn.items()}
    made = layout(tensors, {"format": "pt"})
    content = bytearray(made.size)
    content[: len(made.header)] = made.header
    for name, (start, stop) in made.spans.items():
        content[start:stop] = (
            tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() if tensors[name].numel() else b""
        )
        assert start % tensors[name].element_size() == 0, "aligned, as a mapped file must be"
    theirs = load(save(tensors))
    for back in (load(bytes(content)), tensors_in(content)):
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
            raw = back[name].reshape(-1).view(torch.uint8)
            assert torch.equal(raw, theirs[name].reshape(-1).view(torch.uint8))


def test_a_share_can_be_read_without_descent(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(memory_format=torch.contiguous_format)
    state = {f"model/{n}": t for n, t in model.state_dict().items()}
    state["optimizer/0.weight/exp_avg"] = torch.rand(3, 4).T  # not contiguous
    shares: list[ShareWritten] = []
    writer = ShareWriter(tmp_path, shares.append)
    writer.write(state, step=7, rank=0, world_size=1, generation=1, scalars={})
    writer.wait_until_written()
    folder = tmp_path / "step-00000007"
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    other.load_state_dict(load_file(folder / "model-00000-of-00001.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    with safe_open(folder / "optimizer-00000-of-00001.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("0.weight/exp_avg"), state["optimizer/0.weight/exp_avg"])
        assert file.metadata() == {"format": "pt", "step": "7"}


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {f"model/{n}": t for n, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found |= {f"optimizer/{name}/{k}": v for k, v in optimizer.state[parameter].items()}
    return found


@pytest.mark.parametrize("fused", [False, True])
def test_the_copy_behind_the_next_step_is_of_the_step_before(tmp_path: Path, fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400), nn.BatchNorm1d(400), nn.Linear(400, 1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    shares: list[ShareWritten] = []
    writer = ShareWriter(tmp_path, shares.append)
    optimizer.register_step_pre_hook(lambda *_: writer.wait_for_copy())
    copy_now = {f"model/{n}" for n, _ in model.named_buffers()}
    expected: dict[int, dict[str, Tensor]] = {}
    for step in range(1, 9):
        optimizer.zero_grad()
        model(torch.rand(8, 300)).square().sum().backward()  # changes batch norm's statistics
        optimizer.step()
        state = state_of(model, optimizer)
        expected[step] = {n: t.detach().clone() for n, t in state.items()}
        writer.write(state, step=step, rank=0, world_size=1, generation=1, scalars={}, copy_now=copy_now)
    writer.wait_until_written()
    assert [p.error for p in shares] == [None] * 8
    for share in shares:
        target = commit_checkpoint(tmp_path, [share], run="r", config_sha256="c")
        tensors, _ = read_checkpoint(target)
        assert all(torch.equal(tensors[n], t) for n, t in expected[share.step].items())


def test_a_tensor_that_changes_without_asking_spoils_no_checkpoint(tmp_path: Path) -> None:
    tensors = {f"model/{i}": torch.zeros(1000) for i in range(3)}
    shares: list[ShareWritten] = []
    writer = ShareWriter(tmp_path, shares.append)
    held = threading.Event()
    writer._copier.submit(held.wait)  # the copy can't begin yet
    writer.write(tensors, step=1, rank=0, world_size=1, generation=1, scalars={})
    tensors["model/1"].add_(1)
    held.set()
    writer.wait_until_written()
    assert shares[0].error is not None and "model/1 was changed while it was copied" in shares[0].error
    writer.write(tensors, step=2, rank=0, world_size=1, generation=1, scalars={})
    tensors["model/1"].add_(1)  # from now on copies are made at once
    writer.wait_until_written()
    assert shares[1].error is None
    found = load_file(tmp_path / "step-00000002" / "model-00000-of-00001.safetensors")
    assert torch.equal(found["1"], torch.ones(1000))


def test_a_share_is_given_up_while_the_last_one_is_unfinished_and_says_so(tmp_path: Path) -> None:
    shares: list[ShareWritten] = []
    held = threading.Event()

    def done(share: ShareWritten) -> None:
        if share.step == 1:
            held.wait()  # the first is on disk, but not through yet
        shares.append(share)

    writer = ShareWriter(tmp_path, done)
    tensors = {"model/x": torch.zeros(4)}
    for step in (1, 2):
        writer.write(tensors, step=step, rank=0, world_size=1, generation=1, scalars={}, patience_s=0.01)
    held.set()
    writer.write(tensors, step=3, rank=0, world_size=1, generation=1, scalars={})
    writer.wait_until_written()
    errors = {p.step: p.error for p in shares}
    assert errors[1] is None and errors[3] is None and "still being written" in str(errors[2])


FULL = """
import json, resource, sys, torch
from pathlib import Path
from descent.checkpoint.writer import ShareWriter
shares = []
writer = ShareWriter(Path(sys.argv[1]), shares.append)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for step, size in ((1, 10), (2, int(sys.argv[2])), (3, 10)):
    writer.write({"model/x": torch.zeros(size)}, step=step, rank=0, world_size=1, generation=1, scalars={})
    writer.wait_until_written()
print(json.dumps([[p.step, p.error] for p in shares]))
"""


@pytest.mark.parametrize("size", ["100_000", "1_000_000"])  # the larger one goes past the page cache
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path, size: str) -> None:
    assert resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), size],
        capture_output=True,
        text=True,
        check=True,
    )
    errors = dict(json.loads(done.stdout))
    assert errors["1" if "1" in errors else 1] is None and errors[3] is None
    assert "the disk is full" in errors[2]
    assert [p.name for p in (tmp_path / "step-00000002").iterdir()] == []


def test_what_the_format_can_not_hold_is_named(tmp_path: Path) -> None:
    shares: list[ShareWritten] = []
    writer = ShareWriter(tmp_path, shares.append)
    writer.write(
        {"model/x": torch.zeros(2, dtype=torch.complex128)}, step=1, rank=0, world_size=1, generation=1, scalars={}
    )
    writer.wait_until_written()
    assert shares[0].error == "x: safetensors files can't hold torch.complex128"


def test_writing_takes_a_small_part_of_a_core_but_is_done_well_before_the_next() -> None:
    assert _duty(0.0, math.inf) == _duty(0.2, 600.0) == 0.03  # seldom: no hurry
    assert _duty(30.0, math.inf) == pytest.approx(0.25)  # it is to be done in two minutes
    assert _duty(0.6, 12.0) == pytest.approx(0.1)  # 0.6 s of work in half of 12 s
    assert _duty(9.0, 12.0) == 1.0  # all there is


def test_files_begin_where_the_disk_can_read_them_from_memory(tmp_path: Path) -> None:
    tensors = {"model/w": torch.randn(1000), "optimizer/w/exp_avg": torch.randn(3), "ema/w": torch.ones(7)}
    shares: list[ShareWritten] = []
    writer = ShareWriter(tmp_path, shares.append)
    for step in (1, 2):
        writer.write(tensors, step=step, rank=0, world_size=1, generation=1, scalars={})
        writer.wait_until_written()
    assert writer._buffer.data_ptr() % BLOCK == 0
    for share in shares:
        for file in share.files:
            content = (tmp_path / f"step-{share.step:08d}" / file.name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file.sha256
            assert xxhash.xxh128_hexdigest(content) == file.xxh3_128


def test_a_large_share_becomes_several_files_and_comes_back_whole(tmp_path: Path) -> None:
    """Two ranks; the files carry numbers of their own, and hold each tensor once."""
    tensors = {f"model/{i}": torch.full((4 << 20,), float(i)) for i in range(12)}  # 201 MB
    tensors["optimizer/step"] = torch.tensor(3.0)
    shares: list[ShareWritten] = []
    for rank in (0, 1):
        writer = ShareWriter(tmp_path, shares.append)
        writer.write(tensors, step=1, rank=rank, world_size=2, generation=1, scalars={})
        writer.wait_until_written()
    target = commit_checkpoint(tmp_path, shares, run="r", config_sha256="0" * 64)
    names = sorted(f.name for share in shares for f in share.files)
    assert names[:4] == [f"model-{i:05d}-of-00004.safetensors" for i in range(4)] and len(names) == 5
    found, _ = read_checkpoint(target)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
