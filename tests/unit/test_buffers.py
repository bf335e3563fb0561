"""What becomes of a buffer that the forward changes: combined by its kind, exactly, or refused by name."""

import pytest
import torch
from torch import Tensor, nn

from descent.config import compose
from descent.errors import ConfigError, TrainingError
from descent.training.buffers import Buffers, Rule
from descent.training.plan import Plan, prepare
from tests import buffered


def planned(model: type[nn.Module], *more: str) -> Plan:
    run = ["model=custom", f"model._target_=tests.buffered.{model.__name__}", "trusted_modules=[tests]", *more]
    return prepare(compose(["batch.size=30", "slots=4", "workers=4", *run]).config, cores=4.0, gpus=0.0).plan


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        (buffered.Largest, Rule.MAX),
        (buffered.Smallest, Rule.MIN),
        (buffered.Total, Rule.SUM),
        (buffered.SamplesSeen, Rule.SUM),
        (buffered.Average, Rule.MEAN),
        (buffered.Variance, Rule.MEAN),
        (buffered.Spectrum, Rule.MEAN),
        (buffered.Spread, Rule.MEAN),
        (buffered.Steps, Rule.SAME),
        (buffered.StatedQueue, Rule.SAME),
    ],
)
def test_the_kind_of_a_buffer_is_found_out(model: type[nn.Module], rule: Rule) -> None:
    plan = planned(model)
    assert (plan.changing_buffers, plan.buffer_rules) == (("kept",), (rule,))
    assert Plan.from_dict(plan.to_dict()) == plan


def test_torchs_own_batch_norm_is_known() -> None:
    plan = prepare(compose(["model.norm=batch", "slots=4", "workers=4"]).config, cores=4.0, gpus=0.0).plan
    kinds = dict(zip(plan.changing_buffers, plan.buffer_rules, strict=True))
    assert {n.rpartition(".")[2]: r for n, r in kinds.items()} == {
        "running_mean": Rule.MEAN,
        "running_var": Rule.MEAN,
        "num_batches_tracked": Rule.SAME,
    }


def test_what_can_not_be_combined_is_refused_by_name_and_taken_where_nothing_is_combined() -> None:
    with pytest.raises(ConfigError, match=r"buffer 'kept' into something that is neither.*combine_buffers = \{'kept'"):
        planned(buffered.Queue)
    with pytest.raises(ConfigError, match=r"combine_buffers says 'median' for 'kept'; it may say mean, same"):
        planned(buffered.StatedWrongly)
    assert planned(buffered.Queue, "slots=1", "workers=1").changing_buffers == ("kept",)


def combined(values: list[Tensor], start: Tensor, rule: Rule | None) -> Tensor:
    """A module's buffer after a step whose slots left these values."""
    model = nn.Module()
    model.register_buffer("kept", start.clone() if start.is_contiguous() else start)
    buffers = Buffers(model, ["kept"], None if rule is None else [rule])
    buffers.begin_step()
    rows = []
    for value in values:
        buffers.begin_slot()
        assert torch.equal(model.kept, start)
        model.kept = value.clone() if value.is_contiguous() else value  # written to by the next slot
        rows.append(buffers.pack().clone())
    buffers.combine(torch.stack(rows))
    return model.kept


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_whole_numbers_travel_exactly(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    top = 1 if dtype is torch.bool else torch.iinfo(dtype).max
    values = [torch.full(shape, number, dtype=dtype) for number in (top, top - 1, top // 2)]
    assert torch.equal(combined(values, torch.zeros(shape, dtype=dtype), None), values[0])


def test_whole_numbers_are_added_up_and_compared_exactly() -> None:
    start = torch.tensor([2**60 + 1, -(2**61) - 3])
    values = [start + 1, start + 2, start + 4]
    assert torch.equal(combined(values, start, Rule.SUM), start + 7)
    assert torch.equal(combined(values, start, Rule.MAX), start + 4)
    assert torch.equal(combined(values, start, Rule.MIN), start + 1)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
)
def test_numbers_of_every_precision_are_averaged(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, 3, dtype=dtype, generator=generator) for _ in range(3)]
    exact = sum(v.to(torch.complex128) for v in values) / 3
    found = combined(values, torch.zeros(2, 3, dtype=dtype), None)
    assert found.dtype is dtype
    torch.testing.assert_close(found, exact.to(dtype) if dtype.is_complex else exact.real.to(dtype))


@pytest.mark.parametrize(
    "view",
    [lambda t: t, lambda t: t.T, lambda t: t[:, ::2], lambda t: t[:1].expand(4, -1)],
    ids=["plain", "T", "gaps", "shared"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.complex64])
def test_in_every_memory_layout(view: object, dtype: torch.dtype) -> None:
    def made(number: int) -> Tensor:
        return view(torch.full((4, 4), number).to(dtype))  # type: ignore[operator]

    found = combined([made(2), made(2)], made(0), None)
    assert torch.equal(found, made(2))


def test_a_conjugated_buffer_is_written_to_as_well() -> None:
    value = torch.tensor([1 + 2j, 3 - 1j])
    assert torch.equal(
        combined([value.conj(), value.conj()], torch.zeros(2, dtype=torch.complex64), None), value.conj()
    )


def test_a_buffer_that_begins_to_depend_on_the_samples_ends_the_run_by_its_name() -> None:
    model = buffered.LateFlag()
    buffers = Buffers(model, ["kept"], [Rule.SAME])
    rows = torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=torch.float64)
    buffers.check_agreement(rows, [2, 3, 2, 3], 7)  # another number of forwards explains the difference
    with pytest.raises(TrainingError, match=r"buffer 'kept' depends on the samples from step 7 on.*combine_buffers"):
        buffers.check_agreement(rows, [2, 2, 2, 2], 7)
