"""Losses and schedules of the user's own, and numbers in a config where torch's losses want tensors."""

import pytest
import torch
from torch import nn

from descent.config import RunConfig, compose
from descent.errors import ConfigError
from descent.training.plan import build_loss, build_schedule, prepare
from descent.training.task import build_task
from tests import own_optim

TRUSTED = "trusted_modules=[tests]"


def _config(*overrides: str) -> RunConfig:
    return compose([TRUSTED, *overrides]).config


@pytest.mark.parametrize(
    ("spec", "scale"),
    [
        (["SquaredError"], 1.0),
        (["SquaredError", "+loss.scale=3.0"], 3.0),
        (["squared_error_of", "+loss.scale=3.0"], 3.0),
    ],
)
def test_a_class_and_a_function_that_makes_a_loss_are_called_once(spec: list[str], scale: float) -> None:
    loss = build_loss(_config("loss=custom", f"loss._target_=tests.own_optim.{spec[0]}", *spec[1:]))
    assert isinstance(loss, own_optim.SquaredError)
    assert loss.scale == scale


def test_schedules_in_the_three_forms() -> None:
    itself = build_schedule(_config("schedule=custom", "schedule._target_=tests.own_optim.halving"), 10)
    assert itself is own_optim.halving
    made = ["schedule._target_=tests.own_optim.halving_every", "+schedule.steps=2"]
    assert [build_schedule(_config("schedule=custom", *made), 10)(step) for step in range(4)] == [1, 1, 0.5, 0.5]
    length = ["schedule._target_=tests.own_optim.halving_every", "+schedule.steps=null", "+schedule.total_steps=null"]
    with pytest.raises(ConfigError, match=r"schedule\.total_steps: halving_every has no such argument"):
        build_schedule(_config("schedule=custom", *length), 10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Forgetful", r"Forgetful: gives 1 for step 0, and .*function of the step alone"),
        ("never", r"never: gives 'never' for step 0, must be a finite number"),
    ],
)
def test_a_schedule_that_is_no_function_of_the_step_is_refused(name: str, message: str) -> None:
    config = _config("experiment=digits", "schedule=custom", f"schedule._target_=tests.own_optim.{name}", "workers=1")
    with pytest.raises(ConfigError, match=message):
        prepare(config, cores=1.0, gpus=0.0)


def test_lists_and_numbers_become_the_tensors_that_torchs_losses_want() -> None:
    output, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = build_loss(_config("loss=cross_entropy", "+loss.weight=[1, 2, 0.5]"))
    expected = nn.CrossEntropyLoss(weight=torch.tensor([1, 2, 0.5]))
    assert torch.equal(loss(output, labels), expected(output, labels))
    for given, wanted in (("[1, 2, 3]", torch.tensor([1.0, 2.0, 3.0])), ("2.5", torch.tensor(2.5))):
        loss = build_loss(_config("loss=bce_with_logits", f"+loss.pos_weight={given}"))
        targets = (output > 0).float()
        assert torch.equal(loss(output, targets), nn.BCEWithLogitsLoss(pos_weight=wanted)(output, targets))
    with pytest.raises(ConfigError, match=r"loss\.weight=\['a'\]: must be a number, or a list of numbers"):
        build_loss(_config("loss=cross_entropy", "+loss.weight=[a]"))


@pytest.mark.parametrize("name", ["Projected", "ProjectedModule"])
def test_modules_that_a_task_holds_are_in_evaluation_mode(name: str) -> None:
    """Whether or not the task is a module itself."""
    found = build_task(_config("task=custom", f"task._target_=tests.programs.refused.{name}"))
    assert found is not None
    assert not found.task.head.training


def test_class_weights_of_a_config_pass_the_preflight() -> None:
    weights = "+loss.weight=[1,1,1,1,1,1,1,1,1,2]"
    prepare(_config("experiment=digits", weights, "workers=1"), cores=1.0, gpus=0.0)
