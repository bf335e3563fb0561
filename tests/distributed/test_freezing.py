"""Parameters that are trained from a step on, or never, against a loop by hand that sets requires_grad."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from descent.checkpoint.reader import read_checkpoint
from descent.errors import ConfigError
from descent.storage import to_location
from descent.training.input.sampling import SampleOrder
from descent.training.plan import build_data, build_model
from tests.distributed.replicas import Case, Crew
from tests.distributed.test_resume import resumed, saved
from tests.programs.gan import PROGRAM as GAN
from tests.programs.program import RUN as PLAIN_RUN
from tests.programs.temperature import PROGRAM as TEMPERATURE

STEPS, BATCH, FIRST = 8, 24, 5
OWN = ["model=custom", "model._target_=tests.own_optim.Backboned", "trusted_modules=[tests]"]
RUN = [
    *OWN,
    "optimizer=adamw",
    "optimizer.lr=0.02",
    "optimizer.weight_decay=0.1",
    "optimizer.decay_norm_and_bias=true",
    "schedule=constant",
    f"batch.size={BATCH}",
    f"steps={STEPS}",
    "epochs=null",
    "clip.norm=0.5",
    "checkpoint.every=3",
]
LATER = f"optimizer.groups=[{{match: backbone, lr_scale: 0.5, from_step: {FIRST}}}]"
NEVER = "optimizer.groups=[{match: backbone, freeze: true}]"


def by_hand(case: Case, first: int, clip: float | None = 0.5, fused: bool = False) -> dict[str, torch.Tensor]:
    """The weights after a plain loop whose backbone requires no gradient before step `first`."""
    train, _ = build_data(case.config)
    model = build_model(case.config, train)
    model.requires_grad_(True)
    model = model.train()
    groups = [{"params": list(model.backbone.parameters()), "lr": 0.01}, {"params": list(model.head.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1, fused=fused)
    order = SampleOrder(len(train), BATCH, case.config.seed)
    for step in range(1, STEPS + 1):
        model.backbone.requires_grad_(step >= first)
        inputs, targets = (
            torch.stack(part) for part in zip(*[train[int(i)] for i in order.samples_of(step)], strict=True)
        )
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(("group", "first"), [(LATER, FIRST), (NEVER, STEPS + 1)], ids=["from_step", "freeze"])
@pytest.mark.parametrize("kind", ["exact", "fast"])
def test_frozen_as_by_hand(pool: Crew, tmp_path: Path, group: str, first: int, kind: str) -> None:
    case = Case.of([*RUN, group, f"reduction={kind}"], tmp_path, 2)
    wanted = by_hand(case, first)
    hashes = set()
    for world in (1, 2):
        run = replace(case, run_dir=tmp_path / str(world))
        reports, (target,) = saved(pool, run, world, STEPS)
        hashes.add(reports[0].sha256)
        tensors, _ = read_checkpoint(to_location(str(target)))
        for name, value in wanted.items():
            assert torch.allclose(tensors[f"model/{name}"], value, atol=1e-6), name
        kept = {name for name in tensors if name.startswith("optimizer/backbone")}
        assert bool(kept) == (first <= STEPS)
        assert all(tensors[n].item() == STEPS - first + 1 for n in kept if n.endswith("/step"))
    if kind == "exact":
        assert len(hashes) == 1


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """As a replica has: more threads add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_with_one_slot_the_bits_are_those_of_the_loop(pool: Crew, tmp_path: Path) -> None:
    case = Case.of([*RUN, LATER, "clip.norm=null"], tmp_path, 1)
    _, (target,) = saved(pool, case, 1, STEPS)
    tensors, _ = read_checkpoint(to_location(str(target)))
    wanted = by_hand(case, FIRST, clip=None, fused=True)
    assert all(torch.equal(tensors[f"model/{name}"], value) for name, value in wanted.items())


def test_a_frozen_parameter_keeps_its_bits_and_no_state(pool: Crew, tmp_path: Path) -> None:
    case = Case.of([*RUN, LATER], tmp_path, 2)
    _, (before, after) = saved(pool, case, 2, 3, 6)
    first = build_model(case.config, build_data(case.config)[0]).state_dict()
    at_3, _ = read_checkpoint(to_location(str(before)))
    at_6, _ = read_checkpoint(to_location(str(after)))
    assert torch.equal(at_3["model/backbone.1.weight"], first["backbone.1.weight"])
    assert not torch.equal(at_6["model/backbone.1.weight"], first["backbone.1.weight"])
    assert not any(name.startswith("optimizer/backbone") for name in at_3)


@pytest.mark.parametrize("step", [3, 6])
def test_resumed_before_and_after_the_release(pool: Crew, tmp_path: Path, step: int) -> None:
    case = Case.of([*RUN, LATER], tmp_path, 2)
    whole, (target,) = saved(pool, replace(case, run_dir=tmp_path / "whole"), 2, step)
    assert resumed(pool, case, target, 1).finish().state_sha256 == whole[0].sha256


def test_a_model_that_releases_parameters_in_its_first_forward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ReleasesAtOnce: in its forward .* 'backbone\.1\.weight' .*from_step: 1000"):
        Case.of([*RUN, "model._target_=tests.own_optim.ReleasesAtOnce"], tmp_path)


def test_a_model_that_releases_parameters_later_is_stopped_at_that_step(pool: Crew, tmp_path: Path) -> None:
    case = Case.of([*RUN, "optimizer.lr=0.1", "model._target_=tests.own_optim.ReleasesLater"], tmp_path, 2)
    replicas = pool.build(case, 1)
    pool.form(case, replicas)
    reports = replicas[0].next_report()
    pool.give(replicas)
    assert reports.state == "failed" and "'backbone.1.weight' require a gradient" in reports.error
    assert "from_step" in reports.error and 0 < reports.step < STEPS


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("{match: backbone, freeze: true, lr: 0.1}", r"groups\[0\]: has freeze: true and lr"),
        ("{match: backbone, freeze: 1}", r"groups\[0\]\.freeze=1: must be true or false"),
        ("{match: backbone, from_step: 0.5}", r"groups\[0\]\.from_step=0.5: must be the number of a step"),
        ("{match: backbone, from_step: 9}", r"from_step=9: the run has 8 steps, so 'backbone\.1\.weight' is never"),
        ("{match: nothing, freeze: true}", r"groups\[0\]\.match=nothing: matches no"),
        ("{match: ., freeze: true}", "no parameters to train that optimizer.groups leaves unfrozen"),
        ("{match: ., from_step: 3}", "nothing would be trained before step 3"),
        ("{match: backbone, freeze: true}, {match: backbone, lr: 0.1}", r"groups\[1\]\.match=backbone: .*frozen"),
    ],
)
def test_what_cannot_be_frozen_so_is_refused(tmp_path: Path, group: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Case.of([*RUN, f"optimizer.groups=[{group}]"], tmp_path)


def test_the_parameters_of_a_loss_are_frozen_by_their_names(pool: Crew, tmp_path: Path) -> None:
    values = {}
    for how in ("from_step: 4", "freeze: true"):
        case = Case.of(
            [*PLAIN_RUN, *TEMPERATURE.overrides, f"optimizer.groups=[{{match: '^loss', {how}}}]"], tmp_path / how, 2
        )
        _, targets = saved(pool, case, 2, 3, 6)
        found = [read_checkpoint(to_location(str(target)))[0] for target in targets]
        name = next(name for name in found[0] if name.startswith("loss/"))
        values[how] = [float(tensors[name]) for tensors in found]
    assert (
        values["freeze: true"][0] == values["freeze: true"][1] == values["from_step: 4"][0] != values["from_step: 4"][1]
    )


def test_a_phase_begins_later_with_a_part_of_its_modules(pool: Crew, tmp_path: Path) -> None:
    later = "+optimizer.phases.generator.groups=[{match: 'generator.0', from_step: 5}]"
    case = Case.of([*PLAIN_RUN, *GAN.overrides, later], tmp_path, 2)
    whole, (before, after) = saved(pool, case, 2, 3, 6)
    at_3, at_6 = (read_checkpoint(to_location(str(target)))[0] for target in (before, after))
    assert not torch.equal(at_3["model/generator.3.weight"], at_6["model/generator.3.weight"])
    first = build_model(case.config, build_data(case.config)[0]).state_dict()
    assert torch.equal(at_3["model/generator.0.weight"], first["generator.0.weight"])
    assert not torch.equal(at_6["model/generator.0.weight"], first["generator.0.weight"])
    assert whole[0].sha256 == resumed(pool, case, before, 1).finish().state_sha256
