"""The loss scale of float16, against torch's own GradScaler."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from descent.config import compose
from descent.errors import ConfigError
from descent.training.loss_scale import LossScale
from descent.training.plan import prepare


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_the_scale_is_that_of_grad_scaler_whatever_overflows(overflows: list[bool], growth: int) -> None:
    ours = LossScale(growth_every=growth)
    scaler = torch.amp.GradScaler("cpu", growth_interval=growth)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for overflow in overflows:
        scaler.scale((weight * (float("inf") if overflow else 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        ours.overflowed() if overflow else ours.good()
        assert ours.scale == scaler.get_scale()
        assert ours.good_steps == scaler.state_dict()["_growth_tracker"]
    assert ours.overflows == sum(overflows)
    again = LossScale(growth_every=growth)
    again.load(ours.tensors())
    assert again == ours


def test_the_state_of_another_precision_begins_with_the_first_scale() -> None:
    scale = LossScale(4.0, 7, 9)
    scale.load({})
    assert scale == LossScale()


class Half(nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 10, dtype=torch.float16)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compress=bf16", "reduction=fast"], "precision=fp16: compress=bf16 would keep or round"),
        (
            ["model=custom", "model._target_=tests.unit.test_loss_scale.Half"],
            "the parameter 'weight' is float16 itself",
        ),
    ],
)
def test_what_does_not_go_with_a_scaled_loss_is_refused(overrides: list[str], message: str) -> None:
    base = ["experiment=digits", "workers=1", "precision=fp16", "trusted_modules=[tests]"]
    with pytest.raises(ConfigError, match=message):
        prepare(compose([*base, *overrides]).config, cores=1.0, gpus=0.0)
