"""Weights to begin with: what fits is taken whole, what doesn't is listed."""

import os
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from descent.checkpoint.manifest import commit_checkpoint
from descent.checkpoint.weights import InitialWeights, free_parameters, put_into, read_weights, write_weights
from descent.checkpoint.writer import ShareWriter
from descent.errors import CheckpointError, StoreError
from descent.messages import ShareWritten


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def fresh() -> Tied:
    model = Tied()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape).to(tensor.dtype))
    return model


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def as_checkpoint(model: nn.Module, folder: Path) -> Path:
    shares: list[ShareWritten] = []
    writer = ShareWriter(folder, shares.append)
    plain = {f"model/{n}": t for n, t in model.state_dict().items() if n != "head.weight"}
    writer.write(plain, step=3, rank=0, world_size=1, generation=1, scalars={})
    writer.wait_until_written()
    return commit_checkpoint(folder, shares, run="r", config_sha256="c")


def written(kind: str, model: nn.Module, folder: Path) -> Path:
    state = model.state_dict()
    if kind == "checkpoint":
        return as_checkpoint(model, folder)
    if kind == "safetensors":
        save_file({n: t for n, t in state.items() if n != "head.weight"}, folder / "w.safetensors")
        return folder / "w.safetensors"
    wrapped = {
        "torch": state,
        "torch in a dict": {"model": state, "epoch": 3},
        "torch, of DDP": {f"module.{n}": t for n, t in state.items()},
        "torch, compiled": {f"_orig_mod.{n}": t for n, t in state.items()},
    }[kind]
    torch.save(wrapped, folder / "w.pt")
    return folder / "w.pt"


KINDS = ["checkpoint", "safetensors", "torch", "torch in a dict", "torch, of DDP", "torch, compiled"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_model(kind: str, tmp_path: Path) -> None:
    theirs, ours = fresh(), fresh()
    source = written(kind, theirs, tmp_path)
    assert InitialWeights(source).put_into(ours) is None
    assert equal(ours, theirs) and ours.head.weight is ours.embed.weight


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    weights = dict(fresh().state_dict())
    del weights["norm.bias"], weights["head.weight"]
    weights["embed.weight"], weights["extra"] = torch.zeros(9, 3), torch.zeros(1)
    model, source = fresh(), tmp_path / "w.safetensors"
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        put_into(model, weights, source, strict=True)
    line = str(caught.value)
    assert "missing: norm.bias;" in line and "unexpected: extra;" in line
    assert "of another shape: embed.weight (9, 3) instead of (5, 3); init_strict=false" in line
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()), "untouched"
    unmatched = put_into(model, weights, source, strict=False)
    assert unmatched is not None and "missing: norm.bias" in unmatched
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    assert torch.equal(model.embed.weight, before["embed.weight"])
    with pytest.raises(CheckpointError, match="missing"):
        put_into(model, {"other": torch.zeros(1)}, source, strict=False)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/should-not-be-there",)


def test_a_file_that_would_run_something_is_refused(tmp_path: Path) -> None:
    torch.save({"x": Evil()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="weights_only=True"):
        read_weights(tmp_path / "w.pt")
    assert not Path("/tmp/should-not-be-there").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_damaged_file_is_one_clear_line(name: str, tmp_path: Path) -> None:
    kind = "torch" if name == "w.pt" else "safetensors"
    whole = written(kind, fresh(), tmp_path).read_bytes()
    for length in (0, 1, 8, 9, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            read_weights(tmp_path / name)
    with pytest.raises(StoreError, match="no such file"):
        read_weights(tmp_path / "nothing.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights"):
        read_weights(tmp_path / "empty")


def test_exported_weights_are_one_plain_file(tmp_path: Path) -> None:
    model = fresh()
    plain = {n: t for n, t in model.state_dict().items() if n != "head.weight"}
    write_weights(plain, tmp_path / "out.safetensors", {"format": "pt"})
    assert load_file(tmp_path / "out.safetensors").keys() == plain.keys()


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    taken = tmp_path / "thesis.safetensors"
    taken.write_text("mine")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone")
    for target in (taken, tmp_path / "link.safetensors"):
        with pytest.raises(CheckpointError, match="is there already; give another name"):
            write_weights({"x": torch.zeros(1)}, target, {})
    write_weights({"x": torch.ones(1)}, tmp_path / "w.safetensors", {})
    write_weights({"x": torch.zeros(1)}, tmp_path / "w.safetensors", {}, overwrite=True)
    assert load_file(tmp_path / "w.safetensors")["x"] == 0
    assert taken.read_text() == "mine" and not (tmp_path / "gone").exists()


def test_of_a_checkpoint_only_the_files_with_weights_are_read(tmp_path: Path) -> None:
    """The optimizer's state is twice as large, and nothing of it is needed."""
    shares: list[ShareWritten] = []
    writer = ShareWriter(tmp_path, shares.append)
    tensors = {
        "model/w": torch.ones(3),
        "model/v": torch.ones(2),
        "ema/w": torch.zeros(3),
        "optimizer/w/m": torch.ones(3),
    }
    writer.write(tensors, step=3, rank=0, world_size=1, generation=1, scalars={})
    writer.wait_until_written()
    target = commit_checkpoint(tmp_path, shares, run="r", config_sha256="c")
    (target / "optimizer-00000-of-00001.safetensors").unlink()
    weights = read_weights(target)
    assert {n: t.tolist() for n, t in weights.items()} == {"w": [0.0] * 3, "v": [1.0] * 2}


def test_freed_parameters_take_no_memory_and_come_back_the_same_objects() -> None:
    model = nn.Sequential(Tied(), nn.Linear(3000, 3000).to(torch.float64))
    model[1].weight = nn.Parameter(model[1].weight.detach().t())  # not row by row in memory
    model.elsewhere = [model[0].embed.weight]  # type: ignore[assignment]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    objects = [id(p) for p in model.parameters()]
    used = psutil.Process().memory_full_info().uss
    allocate = free_parameters(model)
    assert used - psutil.Process().memory_full_info().uss > 60e6, "72 MB of parameters"
    assert all(p.untyped_storage().nbytes() == 0 for p in model.parameters())
    assert torch.equal(model[0].norm.running_var, before["0.norm.running_var"]), "buffers stay"
    allocate()
    put_into(model, before, Path("before"), strict=True)
    assert [id(p) for p in model.parameters()] == objects and model.elsewhere[0] is model[0].head.weight
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
