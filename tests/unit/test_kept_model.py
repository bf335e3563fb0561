"""What a finished run gives away: which arguments its model is exported with, and what is kept where it can't be."""

import dataclasses
import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from descent.checkpoint.weights import write_weights
from descent.cluster.record import run_log
from descent.cluster.run.kept_model import ModelKeeper
from descent.cluster.run.saved_model import load
from descent.config import compose
from descent.errors import TrainingError
from descent.tracking import Tracker
from descent.training.export_arguments import arguments_of, export_arguments
from descent.training.plan import Prepared, prepare
from descent.training.task import OwnTask

# -- the arguments --------------------------------------------------------------------------


class One(nn.Module):
    def forward(self, x: Any, labels: Any = None) -> Any: ...


class Two(nn.Module):
    def forward(self, one: Any, other: Any, scale: float = 1.0) -> Any: ...


class NeedsTarget(nn.Module):
    def forward(self, x: Any, target: Any) -> Any: ...


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


A, B, Y = torch.zeros(3, 2), torch.ones(3, 4), torch.zeros(3)
Named = namedtuple("Named", "one other label")


@pytest.mark.parametrize(
    ("model", "batch", "args", "kwargs"),
    [
        (One(), A, (A,), {}),
        (One(), (A, Y), (A,), {}),
        (One(), [A, Y], (A,), {}),
        (Two(), (A, B, Y), (A, B), {}),
        (Two(), ((A, B), Y), (A, B), {}),
        (One(), ((A, B), Y), ((A, B),), {}),
        (One(), {"x": A, "labels": Y, "idx": Y}, (), {"x": A}),
        (Two(), {"one": A, "other": B, "label": Y}, (), {"one": A, "other": B}),
        (Two(), Named(A, B, Y), (), {"one": A, "other": B}),
        (NeedsTarget(), {"x": A, "target": Y}, (), {"x": A, "target": Y}),
        (NeedsTarget(), (A, Y), (A, Y), {}),
        (Anything(), {"a": A, "label_ids": Y, "y": Y}, (), {"a": A}),
        (One(), {"image": A, "label": Y}, ({"image": A, "label": Y},), {}),
    ],
)
def test_the_arguments_of_a_batch_are_those_that_forward_takes_without_the_answers(
    model: nn.Module, batch: Any, args: Any, kwargs: Any
) -> None:
    assert repr(arguments_of(model, batch)) == repr((args, kwargs))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (A, ((A,), {})),
        ((A, B), ((A, B), {})),
        ({"x": A}, ((), {"x": A})),
        (((A,), {"other": B}), ((A,), {"other": B})),
    ],
)
def test_the_tasks_own_export_args_decide(given: Any, expected: Any) -> None:
    class Task:
        def loss(self, model: nn.Module, batch: Any) -> Tensor: ...

        def export_args(self, batch: Any) -> Any:
            return batch["given"]

    task = OwnTask.of(Task(), "task")
    assert repr(export_arguments(task, One(), {"given": given})) == repr(expected)
    with pytest.raises(TrainingError, match=r"export_args gives int; it may give a tensor, a tuple of arguments"):
        export_arguments(task, One(), {"given": 3})


# -- what is kept ---------------------------------------------------------------------------


class Refuses(nn.Module):
    """A network that torch.export can't trace."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(x.flatten(1))
        return x if x.sum() > 0 else -x


def keeper_of(model: nn.Module, folder: Path, **others: Any) -> tuple[ModelKeeper, Tracker, Path]:
    """A keeper for a digits run whose model is this one, with a tracker that delivers nowhere yet."""
    config = compose([f"output_dir={folder}", "model=custom", f"model._target_={__name__}.Refuses"]).config
    digits = prepare(compose(["experiment=digits"]).config, cores=1, gpus=0)
    prepared: Prepared = dataclasses.replace(digits, model=model, **others)
    run_dir = folder / "runs" / "kept"
    run_dir.mkdir(parents=True)
    saved = {"name": "kept", "config": config.to_dict(), "model": config.model, "overrides": [], "config_sha256": "c"}
    run_log.write_run_file(run_dir, saved)
    tracker = Tracker.open(
        uri=f"sqlite:///{folder}/mlflow.db",
        experiment="e",
        run_name="kept",
        spool_dir=run_dir / "spool",
        artifact_root=folder,
        run_id=None,
    )
    return ModelKeeper(prepared, tracker, run_dir), tracker, run_dir


def spooled(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "spool" / "records.jsonl").read_text().splitlines()]


def test_a_model_that_can_not_be_exported_leaves_its_weights_that_load_takes(tmp_path: Path) -> None:
    model, trained = Refuses(), Refuses()
    write_weights(trained.state_dict(), tmp_path / "trained.safetensors", {})
    keeper, tracker, run_dir = keeper_of(model, tmp_path)
    line = keeper.keep(tmp_path / "trained.safetensors", "kept", 7, {})
    assert line is not None and line.startswith(
        "Refuses can't be exported with torch.export: test_kept_model.py, line "
    )
    assert "(return x if x.sum() > 0 else -x): what happens here depends on the values" in line
    files = [record for record in spooled(run_dir) if record["op"] == "file"]
    assert [record["path"] for record in files] == ["model", "model"]
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for record in files:
        source = run_dir / "spool" / "files" / record["file"]
        (downloaded / source.name.rpartition("/")[2]).write_bytes(source.read_bytes())
    names = {path.name for path in downloaded.iterdir()}
    assert names == {"model.safetensors", "run.json"}, names
    assert load_file(downloaded / "model.safetensors").keys() == trained.state_dict().keys()
    again = load(downloaded, trusted_modules=[__name__.split(".")[0]])
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in trained.state_dict().items())
    tracker.discard()


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


class WithTokenizer:
    def __init__(self) -> None:
        self.processing_class = tokenizer()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss


def test_a_model_of_hugging_face_leaves_as_its_own_folder_with_adapters_merged_and_the_tokenizer(
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.distributed.adapters import base, lora

    base().save_pretrained(tmp_path / "base")
    model, trained = lora(str(tmp_path / "base")), lora(str(tmp_path / "base"))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    names = set(dict(trained.named_parameters()))
    write_weights({n: t for n, t in trained.state_dict().items() if n in names}, tmp_path / "w.safetensors", {})
    tokens = torch.randint(0, 17, (3, 8))
    sample = {"input_ids": tokens, "labels": tokens}
    task = OwnTask.of(WithTokenizer(), "task")
    keeper, tracker, run_dir = keeper_of(model, tmp_path, sample=sample, task=task)
    assert keeper.keep(tmp_path / "w.safetensors", "kept", 7, {}) is None
    with torch.no_grad():
        expected = trained.eval()(input_ids=tokens).logits
        loaded = AutoModelForCausalLM.from_pretrained(run_dir / "huggingface")
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(run_dir / "huggingface")("a b a")["input_ids"] == [1, 2, 1]
    records = spooled(run_dir)
    kept = {
        Path(record["file"]).name for record in records if record["op"] == "file" and record["path"] == "huggingface"
    }
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= kept
    assert [record["name"] for record in records if record["op"] == "model"] == ["kept"]
    tracker.discard()
