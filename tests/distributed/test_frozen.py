"""Checkpoints of a model with adapters hold what is trained; the frozen base is built again, and must be the same."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from descent.checkpoint.frozen import digest_of, frozen_parameters
from descent.checkpoint.manifest import commit_checkpoint, read_manifest
from descent.checkpoint.weights import InitialWeights, put_checkpoint_into, read_weights
from descent.cluster.run.kept_model import for_use
from descent.errors import CheckpointError
from tests.distributed.adapters import base, lora
from tests.distributed.led import LedRun, shares_of
from tests.distributed.replicas import Case, Crew

RUN = [
    "model=custom",
    "model._target_=tests.distributed.adapters.lora",
    "data=custom",
    "data.train._target_=tests.programs.causal_language_model.Blocks",
    "task=auto",
    "trusted_modules=[tests]",
    "batch.size=24",
    "steps=6",
    "epochs=null",
    "optimizer.lr=0.01",
    "checkpoint.every=3",
]


def case_of(folder: Path, *more: str, run: str = "run") -> Case:
    if not (folder / "base").exists():
        base().save_pretrained(folder / "base")
    return Case.of([*RUN, f"+model.folder={folder / 'base'}", *more], folder / run)


@pytest.mark.parametrize("save_frozen", ["auto", "true"])
def test_a_run_with_adapters_goes_on_from_what_was_trained(pool: Crew, tmp_path: Path, save_frozen: str) -> None:
    case = case_of(tmp_path, f"checkpoint.save_frozen={save_frozen}", run="whole")
    whole = pool.train(case, 2)
    root = case.run_dir / "checkpoints"
    target = commit_checkpoint(root, shares_of(whole, 3), run="r", config_sha256="0" * 64)
    trained = {name for name, p in lora(str(tmp_path / "base")).named_parameters() if p.requires_grad}
    kept = read_weights(target)
    assert trained and (set(kept) == trained) == (save_frozen == "auto")
    assert bool(read_manifest(target).frozen) == (save_frozen == "auto")
    run = LedRun(pool, dataclasses.replace(case, run_dir=tmp_path / "again"), resumed=target)
    run.start(3)
    last = run.finish()
    assert (last.step, last.state_sha256) == (6, whole[0].sha256)


def test_another_base_model_is_refused_wherever_the_checkpoint_is_read(pool: Crew, tmp_path: Path) -> None:
    case = case_of(tmp_path)
    whole = pool.train(case, 1)
    target = commit_checkpoint(case.run_dir / "checkpoints", shares_of(whole, 6), run="r", config_sha256="0" * 64)
    model = lora(str(tmp_path / "base"))
    put_checkpoint_into(model, target)
    again = lora(str(tmp_path / "base"))
    assert InitialWeights(target).put_into(again) is None
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    base(seed=1).save_pretrained(tmp_path / "base")
    other = lora(str(tmp_path / "base"))
    for put in (put_checkpoint_into, lambda m, t: InitialWeights(t).put_into(m)):
        with pytest.raises(CheckpointError, match="are not those that it was trained with: the base model"):
            put(other, target)
    replicas = pool.build(dataclasses.replace(case, run_dir=tmp_path / "again"), 2)
    pool.form(case, replicas, (1,), restore_from=target, save_only=True)
    for reports in [replica.next_report() for replica in replicas]:
        assert (
            reports.state == "broken" and "the base model, or the file that it comes from, has changed" in reports.error
        )
    pool.give(replicas)


def test_the_model_that_is_given_away_has_the_adapters_merged(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model = lora(str(tmp_path / "base"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    tokens = torch.randint(0, 17, (3, 8))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
        merged = for_use(model)
        torch.testing.assert_close(merged(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name in merged.state_dict())
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items()), "the run's own is untouched"


def test_the_digest_covers_every_bit_and_name() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    found = frozen_parameters(model)
    assert list(found) == ["0.weight", "0.bias"]
    first = digest_of(found)
    assert digest_of({"weight": found["0.weight"], "0.bias": found["0.bias"]}) != first
    found["0.bias"].view(torch.int32)[0] ^= 1
    assert digest_of(found) != first
