"""A model that another worker, or a later run, could not compute again is refused before the run; or it is made to."""

import pytest
import torch
from torch import nn

from descent.config import compose
from descent.errors import DescentError, TrainingError
from descent.training import plan
from descent.training.buffers import Buffers
from descent.training.plan import Prepared, prepare
from tests import hard_to_repeat as hard
from tests.hard_to_repeat import overrides


def prepared(model: type[nn.Module], *more: str) -> Prepared:
    return prepare(compose([*overrides(model), *more]).config, cores=1.0, gpus=0.0)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (hard.Forgetful, "changes the buffer 'mean', which is not persistent: .*persistent=True"),
        (hard.LateBuffer, "first forward registers the buffer 'mean'; do that in __init__"),
        (hard.Counting, "gives another output when the same samples come again.*register_buffer"),
        (hard.SetByTheFirstBatch, "writes the parameter 'shift'.*set it in __init__"),
        (hard.BuiltByItsOwnGenerator, "two models built with seed=0 differ in 'shift'.*that nothing seeds"),
        (hard.LaidOutByItsForward, "changes how the parameter 'conv.weight' lies in memory.*in __init__"),
        (hard.Expanded, r"entries of the parameter 'scale', of shape \[64\], lie at one place in memory.*clone it"),
        (hard.WithoutDeterministicKernel, "max_unpool.* does not have a deterministic .*reduction=fast"),
    ],
)
def test_what_can_not_be_repeated_is_refused_with_the_cure(model: type[nn.Module], why: str) -> None:
    with pytest.raises(DescentError, match=why):
        prepared(model)


def test_what_only_the_bits_depend_on_goes_with_a_reduction_that_does_not_promise_them() -> None:
    expected = prepared(hard.Plain, "reduction=fast").plan
    for model in (hard.Counting, hard.WithoutDeterministicKernel):
        assert prepared(model, "reduction=fast").plan == expected


def test_what_a_model_draws_as_it_is_built_follows_the_seed() -> None:
    first, again, other = (prepared(hard.BuiltByNumpy, f"seed={seed}").model.shift for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_model_is_looked_at_in_the_precision_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # Any CPU can compute in bfloat16 for a forward; which ones do it well is asked elsewhere.
    monkeypatch.setattr(plan, "has_bf16", lambda _: True)
    assert prepared(hard.InOneDtype).plan == prepared(hard.Plain, "precision=bf16").plan
    with pytest.raises(DescentError, match=r"InOneDtype: can't take this data.*dtype"):
        prepared(hard.InOneDtype, "precision=bf16")


@pytest.mark.parametrize(
    ("model", "buffers", "elsewhere"),
    [
        (hard.Centred, ("mean",), False),
        (hard.Lazy, (), False),
        (hard.DrawingLate, ("forwards",), False),
        (hard.DrawingElsewhere, (), True),
        (hard.AlwaysDrawing, (), False),
        (hard.LookedUp, (), False),
    ],
)
def test_the_rest_is_found_out(model: type[nn.Module], buffers: tuple[str, ...], elsewhere: bool) -> None:
    found = prepared(model)
    assert (found.plan.changing_buffers, found.plan.uses_non_torch_rng) == (buffers, elsewhere)
    state = found.model.state_dict()
    assert not any(state[name].any() for name in buffers)  # the look at it has left no trace


def test_a_buffer_that_begins_to_change_later_ends_the_run_by_its_name() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), hard.DrawingLate())
    buffers = Buffers(model, ["0.running_mean", "0.running_var", "0.num_batches_tracked"])
    buffers.begin_step()
    model[0](torch.randn(4, 3))
    buffers.check_constants(7)
    model[1](torch.randn(2, 1, 8, 8))
    with pytest.raises(TrainingError, match=r"buffer '1\.forwards' changes from step 7 on"):
        buffers.check_constants(7)
    buffers.begin_step()
    buffers.check_constants(8)


def test_a_replaced_buffer_goes_back_and_is_averaged_like_one_written_in_place() -> None:
    model = hard.Centred()
    buffers = Buffers(model, ["mean"])
    assert isinstance(model.mean, torch.Tensor)
    buffers.begin_step()
    rows = []
    for value in (1.0, 3.0):
        model.mean = torch.full((1, 8, 8), value)
        rows.append(buffers.pack().clone())
        buffers.restart()
        assert not model.mean.any()
    buffers.combine(torch.stack(rows))
    assert torch.equal(model.mean, torch.full((1, 8, 8), 2.0))
