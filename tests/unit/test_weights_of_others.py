"""`init_from` with files as other programs write them: each gives the very weights, or one line with what to change."""

import argparse
import collections
import json
import os
import pathlib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from descent.checkpoint.fit import Rules
from descent.checkpoint.weights import InitialWeights
from descent.config import compose
from descent.errors import CheckpointError, ConfigError


class Net(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 5))
        self.head = nn.Linear(5, classes)


def fresh(model: nn.Module) -> nn.Module:
    """The model with other values in every tensor."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.ones_like(tensor))
    return model


def state(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def equal(one: nn.Module, other: nn.Module) -> bool:
    others = other.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in one.state_dict().items())


def begin(source: Path, strict: bool = True, key: str | None = None, rules: Any = ()) -> tuple[Net, str | None]:
    model = Net()
    return model, InitialWeights(source, strict, key, rules).put_into(fresh(model))


# -- Hugging Face, torchvision, timm ------------------------------------------------------


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **sizes))


@pytest.mark.parametrize("form", ["one file", "several files", "bin", "several bins"])
def test_a_folder_of_hugging_face(form: str, tmp_path: Path) -> None:
    theirs, ours = fresh(bert()), fresh(bert())
    if form.endswith(("file", "files")):
        theirs.save_pretrained(tmp_path, max_shard_size="5KB" if form == "several files" else "1GB")
        assert (tmp_path / "model.safetensors.index.json").exists() == (form == "several files")
    else:
        theirs.config.save_pretrained(tmp_path)
        names = list(theirs.state_dict())
        cut = len(names) // 2 if form == "several bins" else len(names)
        files = [dict(list(theirs.state_dict().items())[a:b]) for a, b in ((0, cut), (cut, len(names))) if a < b]
        placed = {}
        for index, content in enumerate(files):
            name = "pytorch_model.bin" if len(files) == 1 else f"pytorch_model-{index:05d}.bin"
            torch.save(content, tmp_path / name)
            placed |= dict.fromkeys(content, name)
        if len(files) > 1:
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    torch.save({"state": {}}, tmp_path / "optimizer.pt")  # as the Trainer does
    assert InitialWeights(tmp_path).put_into(ours) is None
    assert equal(ours, theirs)
    loaded = type(ours).from_pretrained(tmp_path)
    assert equal(ours, loaded)


def test_the_base_model_of_hugging_face_begins_a_model_with_a_head(tmp_path: Path) -> None:
    theirs, ours = fresh(bert()), fresh(bert())
    theirs.bert.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing: classifier\.weight, classifier\.bias; init_strict=false"):
        InitialWeights(tmp_path).put_into(ours)
    said = InitialWeights(tmp_path, strict=False).put_into(ours)
    assert said is not None and "prefix 'bert.' put before" in said and "missing: classifier.weight" in said
    assert equal(ours.bert, theirs.bert)


def test_the_checkpoints_of_torchvisions_and_timms_scripts(tmp_path: Path) -> None:
    """The ImageNet example trains with DataParallel; timm's script keeps its arguments, and averages beside the weights."""
    theirs, source = fresh(Net()), tmp_path / "model_best.pth.tar"
    saved = {"epoch": 3, "arch": "resnet18", "best_acc1": torch.tensor(71.0), "optimizer": {"state": {}}}
    torch.save({**saved, "state_dict": state(theirs, "module.")}, source)
    ours, said = begin(source)
    assert equal(ours, theirs) and said is None
    plain, averaged = fresh(Net()), fresh(Net())
    kept = {"epoch": 1, "arch": "vit", "args": argparse.Namespace(lr=0.1), "metric": np.float64(71.0), "version": 2}
    torch.save({**kept, "state_dict": plain.state_dict(), "state_dict_ema": averaged.state_dict()}, source)
    ours, _ = begin(source)
    assert equal(ours, averaged)


# -- checkpoints of training programs -----------------------------------------------------


PREFIXES = ["", "model.", "net.", "module.", "_orig_mod.", "model._orig_mod.", "module.model.", "net.module.", "a.b."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_checkpoint_of_lightning(prefix: str, tmp_path: Path) -> None:
    theirs = fresh(Net())
    beside = {"loss.weight": torch.ones(4), "train_acc.total": torch.zeros(())} if prefix == "net." else {}
    torch.save(
        {
            "epoch": 2,
            "global_step": 40,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": {**state(theirs, prefix), **beside},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}],
            "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.5)}},
            "hyper_parameters": argparse.Namespace(width=5, dir=pathlib.PurePosixPath("runs"), lr=np.float64(0.1)),
        },
        tmp_path / "last.ckpt",
    )
    ours, said = begin(tmp_path / "last.ckpt")
    assert equal(ours, theirs)
    own_word = set(prefix.replace("_orig_mod.", "").split(".")) - {"", "model", "module"}
    assert (said is not None) == bool(own_word)
    if prefix == "net.":
        assert said is not None
        assert said.endswith("prefix 'net.' taken off, names without it left out: loss.weight, train_acc.total")


def test_a_wrapper_inside_the_names_is_taken_off_and_found_in_the_model(tmp_path: Path) -> None:
    theirs = fresh(Net())
    names = {n.replace("body.", "body._checkpoint_wrapped_module."): t for n, t in theirs.state_dict().items()}
    torch.save(names, tmp_path / "w.pt")
    ours, said = begin(tmp_path / "w.pt")
    assert equal(ours, theirs) and said is None
    compiled = Net()
    compiled.body = torch.compile(compiled.body)  # type: ignore[assignment]
    assert "body._orig_mod.0.weight" in compiled.state_dict()
    InitialWeights(tmp_path / "w.pt").put_into(compiled)
    assert equal(compiled.body._orig_mod, theirs.body)


def test_of_two_sets_that_fit_the_averaged_one_is_taken_and_the_line_says_so(tmp_path: Path) -> None:
    plain, averaged = fresh(Net()), fresh(Net())
    source = tmp_path / "ema.pth"
    torch.save({"state_dict": state(plain), "state_dict_ema": state(averaged, "module."), "epoch": 1}, source)
    ours, said = begin(source)
    assert equal(ours, averaged)
    assert said == (
        f"{source}: 'state_dict_ema' (averaged weights) taken, and not state_dict, which fits as well: init_key=… chooses"
    )
    ours, said = begin(source, key="state_dict")
    assert equal(ours, plain) and said is None
    with pytest.raises(
        CheckpointError, match="init_key=ema: the file has no such part; it has state_dict, state_dict_ema"
    ):
        begin(source, key="ema")


def test_the_part_that_fits_is_found_by_itself(tmp_path: Path) -> None:
    theirs = fresh(Net())
    other = {"conv.weight": torch.zeros(3, 3), "scale": torch.zeros(())}
    torch.save({"netD": other, "networks": {"netG": state(theirs)}, "best": torch.tensor(1.0)}, tmp_path / "gan.pt")
    ours, said = begin(tmp_path / "gan.pt")
    assert equal(ours, theirs) and said is None


def test_a_prefix_that_fits_twice_must_be_chosen(tmp_path: Path) -> None:
    student, teacher = fresh(Net()), fresh(Net())
    torch.save({**state(student, "student."), **state(teacher, "teacher.")}, tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=r"each of the prefixes student\., teacher\. .* init_map=\{student\.: ''\}"
    ):
        begin(tmp_path / "w.pt")
    ours, _ = begin(tmp_path / "w.pt", rules=[{"teacher.": "", "student.": None}])
    assert equal(ours, teacher)


@pytest.mark.parametrize(
    "rules",
    [
        [{"backbone.layer": "body.", "fc.": "head."}],
        [{"^backbone\\.layer(\\d+)": "body.\\1"}, {"fc.": "head."}],
    ],
)
def test_init_map_gives_names_that_no_prefix_explains(rules: list[Rules], tmp_path: Path) -> None:
    theirs = fresh(Net())
    renamed = {n.replace("body.", "backbone.layer").replace("head.", "fc."): t for n, t in theirs.state_dict().items()}
    torch.save(renamed, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"missing: body\.0\.weight"):
        begin(tmp_path / "w.pt")
    ours, said = begin(tmp_path / "w.pt", rules=rules)
    assert equal(ours, theirs) and said is None
    with pytest.raises(
        CheckpointError, match=r"init_map: no name begins with 'back\.'; names in the file are backbone"
    ):
        begin(tmp_path / "w.pt", rules=[{"back.": ""}])


def test_init_map_is_a_key_of_the_config() -> None:
    config = compose(["init_map={net.: '', fc.: null}"]).config
    assert config.init_rules == [{"net.": "", "fc.": None}]
    assert compose(["init_map=[{a.: b.},{b.: c.}]"]).config.init_rules == [{"a.": "b."}, {"b.": "c."}]
    typed = compose(["init_map=['^body(\\d) -> layer\\1', 'fc. -> null', 'net. ->']"]).config.init_rules
    assert typed == [{"^body(\\d)": "layer\\1"}, {"fc.": None}, {"net.": ""}]
    with pytest.raises(ConfigError, match=r"'\^\(' is no regular expression"):
        compose(["init_map=['^( -> x']"])
    with pytest.raises(ConfigError, match=r"'net\.' needs the form 'old -> new'"):
        compose(["init_map=[net.]"])


# -- what lies beside the weights ----------------------------------------------------------


HARMLESS = {
    "numpy number": np.float64(0.1),
    "numpy array": np.arange(6.0).reshape(2, 3),
    "numpy text": np.str_("x"),
    "arguments": argparse.Namespace(lr=0.1, dims=[1, 2]),
    "namespace": types.SimpleNamespace(a=1),
    "path": pathlib.PurePosixPath("a/b"),
    "defaultdict": collections.defaultdict(list, {"loss": [1.0]}),
    "counter": collections.Counter("aab"),
    "version": torch.__version__,
    "types": [int, float, dict],
    "random": np.random.RandomState(0).get_state(),
}


@pytest.mark.parametrize("kind", HARMLESS)
@pytest.mark.parametrize("legacy", [False, True])
def test_harmless_objects_beside_the_weights(kind: str, legacy: bool, tmp_path: Path) -> None:
    theirs = fresh(Net())
    content = {"state_dict": theirs.state_dict(), "beside": HARMLESS[kind]}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    allowed = set(torch.serialization.get_safe_globals())
    ours, said = begin(tmp_path / "w.pt")
    assert equal(ours, theirs) and said is None
    assert set(torch.serialization.get_safe_globals()) == allowed, "nothing stays allowed"


def test_a_configuration_of_omegaconf_beside_the_weights(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    theirs = fresh(Net())
    settings = OmegaConf.create({"model": {"width": 5, "dims": [1, 2.5, "x", None, True]}})
    torch.save({"state_dict": theirs.state_dict(), "hyper_parameters": settings}, tmp_path / "w.ckpt")
    ours, _ = begin(tmp_path / "w.ckpt")
    assert equal(ours, theirs)


@pytest.mark.parametrize("order", ["C", "F"])
def test_weights_as_numpy_arrays(order: Any, tmp_path: Path) -> None:
    theirs = fresh(Net())
    arrays = {n: np.array(t.numpy(), order=order) for n, t in theirs.state_dict().items()}
    torch.save({"model": arrays}, tmp_path / "w.pth")
    ours, _ = begin(tmp_path / "w.pth")
    assert equal(ours, theirs)


class Settings:
    """Somebody's own class."""

    width = 5


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_refused_is_named_with_the_cure(legacy: bool, tmp_path: Path) -> None:
    source = tmp_path / "w.pth.tar"
    for beside in (Settings(), Net()):
        kept = {"state_dict": Net().state_dict(), "beside": beside}
        torch.save(kept, source, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError) as caught:
            begin(source)
        line = str(caught.value)
        assert f"{type(beside).__module__}.{type(beside).__name__}" in line and "\n" not in line
        assert "weights_only=True, which alone is safe" in line
        assert "torch.save(saved['state_dict'], 'weights.pt')" in line
    torch.save({"state_dict": Net().state_dict(), "x": Evil(tmp_path / "made")}, source)
    with pytest.raises(CheckpointError, match=r"objects of posix\.mkdir"):
        begin(source)
    assert not (tmp_path / "made").exists()


def test_a_file_that_holds_a_program_is_refused_with_the_cure(tmp_path: Path) -> None:
    torch.jit.script(Net()).save(str(tmp_path / "w.pt"))
    with pytest.raises(CheckpointError, match=r"is a TorchScript archive, .*torch\.jit\.load\(.*\)\.state_dict\(\)"):
        begin(tmp_path / "w.pt")


def test_folders_and_files_without_weights_say_what_is_needed(tmp_path: Path) -> None:
    cases: dict[str, tuple[tuple[str, ...], str]] = {
        "empty": ((), "no weights in this folder: needed is model.safetensors, pytorch_model.bin"),
        "flax": (("config.json", "flax_model.msgpack"), "files of Flax are not read"),
        "sharded": ((".metadata", "__0_0.distcp"), "format_utils dcp_to_torch"),
        "several": (("a.pt", "b.pt"), r"has several files of weights \(a.pt, b.pt\); give one of them: .*/a.pt"),
    }
    for folder, (names, message) in cases.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
        with pytest.raises(CheckpointError, match=message):
            begin(tmp_path / folder)
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07")
    with pytest.raises(CheckpointError, match="no weights that can be read: a file of ONNX"):
        begin(tmp_path / "model.onnx")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"holds no tensors by name .a state_dict., but a list"):
        begin(tmp_path / "list.pt")


def test_an_index_names_only_files_beside_it(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "secret.bin")
    (tmp_path / "hf").mkdir()
    index = {"weight_map": dict.fromkeys(Net().state_dict(), "../secret.bin")}
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names the file '../secret.bin', which is not beside it"):
        begin(tmp_path / "hf")
