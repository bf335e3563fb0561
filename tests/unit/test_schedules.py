"""Schedules against torch's own schedulers, and the plateau against ReduceLROnPlateau."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as ref

from descent.errors import CheckpointError, ConfigError
from descent.optim import schedules as ours

FOLDER = Path(__file__).parents[2] / "configs" / "schedule"
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "custom")
WARMUPS = st.integers(0, 7)
GAMMAS = st.floats(0.05, 1.0)
# The first example pays for imports, and the machine may be busy: time decides nothing here.
property_test = settings(deadline=None, max_examples=60)


def _torchs(build: Callable[[torch.optim.Optimizer], Any], steps: int, warmup: int) -> list[float]:
    """The learning rate of each update as torch's scheduler sets it; base rate 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build(optimizer)
    if warmup > 1:
        rise = ref.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
        scheduler = ref.SequentialLR(optimizer, [rise, scheduler], [warmup])
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def _same(schedule: ours.Schedule, build: Callable[..., Any], steps: int, warmup: int) -> None:
    mine = [schedule(s) for s in range(steps)]
    # A warm-up of one step has the whole rate at once, the same as none but one step longer.
    reference = _torchs(build, steps - (warmup == 1), warmup)
    if warmup == 1:
        reference = reference[:1] + reference
    assert mine == pytest.approx(reference, rel=1e-6, abs=1e-9)


@property_test
@given(WARMUPS, st.integers(1, 9), GAMMAS)
def test_step_is_torchs(warmup: int, size: int, gamma: float) -> None:
    schedule = ours.Step(step_size=size, gamma=gamma, warmup_steps=warmup)
    _same(schedule, lambda o: ref.StepLR(o, size, gamma), 30, warmup)


@property_test
@given(WARMUPS, st.lists(st.integers(1, 25), min_size=1, max_size=4), GAMMAS)
def test_multistep_is_torchs(warmup: int, milestones: list[int], gamma: float) -> None:
    milestones.sort()
    schedule = ours.MultiStep(milestones=tuple(milestones), gamma=gamma, warmup_steps=warmup)
    _same(schedule, lambda o: ref.MultiStepLR(o, milestones, gamma), 30, warmup)


@property_test
@given(WARMUPS, GAMMAS)
def test_exponential_is_torchs(warmup: int, gamma: float) -> None:
    schedule = ours.Exponential(gamma=gamma, warmup_steps=warmup)
    _same(schedule, lambda o: ref.ExponentialLR(o, gamma), 30, warmup)


@property_test
@given(WARMUPS, st.integers(1, 30), st.floats(0.5, 3.0))
def test_polynomial_is_torchs_and_stays_at_its_end(warmup: int, length: int, power: float) -> None:
    schedule = ours.Polynomial(power=power, warmup_steps=warmup, total_steps=warmup + length)
    _same(schedule, lambda o: ref.PolynomialLR(o, length, power), warmup + length + 5, warmup)


@property_test
@given(WARMUPS, st.integers(1, 30), st.floats(0.0, 0.9))
def test_cosine_is_torchs_and_stays_at_its_end(warmup: int, length: int, low: float) -> None:
    total = warmup + length
    schedule = ours.Cosine(min_multiplier=low, warmup_steps=warmup, total_steps=total)
    # torch's goes up again after the end; ours is compared up to it.
    _same(schedule, lambda o: ref.CosineAnnealingLR(o, length, low), total + (warmup != 1), warmup)
    assert schedule(total + 7) == pytest.approx(low)


@property_test
@given(WARMUPS, st.integers(1, 9), st.integers(1, 3), st.floats(0.0, 0.9))
def test_cosine_restarts_are_torchs(warmup: int, period: int, factor: int, low: float) -> None:
    schedule = ours.CosineRestarts(period=period, period_factor=factor, min_multiplier=low, warmup_steps=warmup)
    _same(schedule, lambda o: ref.CosineAnnealingWarmRestarts(o, period, factor, low), 40, warmup)


@property_test
@given(
    st.integers(2, 40),
    st.floats(0.0, 0.95),
    st.floats(1.0, 50.0),
    st.floats(1.0, 1e4),
    st.sampled_from(["cos", "linear"]),
)
def test_one_cycle_is_torchs_without_the_momentum(
    total: int, pct: float, div: float, final: float, anneal: str
) -> None:
    if pct * total == 1.0:
        pct += 0.01  # torch divides by zero where the way up has no length
    schedule = ours.OneCycle(pct_start=pct, div_factor=div, final_div_factor=final, anneal=anneal, total_steps=total)

    def build(o: torch.optim.Optimizer) -> Any:
        return ref.OneCycleLR(
            o,
            max_lr=1.0,
            total_steps=total,
            pct_start=pct,
            anneal_strategy=anneal,
            div_factor=div,
            final_div_factor=final,
            cycle_momentum=False,
        )

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build(optimizer)
    for step in range(total):
        assert schedule(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-9)
        optimizer.step()
        if step < total - 1:
            scheduler.step()


def test_one_cycle_starts_at_its_peak_where_the_way_up_has_no_length() -> None:
    assert ours.OneCycle(pct_start=0.1, total_steps=10)(0) == 1.0


@property_test
@given(st.integers(1, 20), st.integers(0, 200))
def test_inverse_square_root_is_the_first_transformers(warmup: int, step: int) -> None:
    schedule = ours.InverseSquareRoot(warmup_steps=warmup)
    # Vaswani et al., equation 3, with its peak scaled to 1. Theirs counts from 1 and has the
    # peak in step W only; ours has it in the last of the warm-up and the first after it.
    rising, falling = (step + 1) / warmup, math.sqrt(warmup / max(step, warmup))
    assert schedule(step) == pytest.approx(min(rising, falling))


@property_test
@given(
    st.integers(0, 10),
    st.integers(1, 60),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
    st.sampled_from(["linear", "cosine", "sqrt"]),
)
def test_warmup_stable_decay_is_flat_then_falls_to_its_end(
    warmup: int, length: int, share: float, low: float, decay: str
) -> None:
    total = warmup + length
    steps = max(1, round(share * total))
    if steps > length:
        with pytest.raises(ConfigError, match="decay_share"):
            ours.WarmupStableDecay(warmup, total, decay_share=share)
        return
    schedule = ours.WarmupStableDecay(warmup, total, decay_share=share, min_multiplier=low, decay=decay)
    assert all(schedule(s) == 1.0 for s in range(warmup, total - steps + 1))
    falling = [schedule(s) for s in range(total - steps, total + 1)]
    assert all(a >= b for a, b in itertools.pairwise(falling))
    assert falling[-1] == pytest.approx(low)
    middle = {"linear": 0.5, "cosine": 0.5, "sqrt": 1 - math.sqrt(0.5)}[decay]
    if steps % 2 == 0:
        assert falling[steps // 2] == pytest.approx(low + (1 - low) * middle)


def _from_config(path: Path, total: int) -> Any:
    options = yaml.safe_load(path.read_text())
    kind = options.pop("_target_").rpartition(".")[2]
    return getattr(ours, kind)(**{**options, "total_steps": total})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_for_any_length_of_run(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    for total in (1, 2, 3, 10, 1000):
        schedule = _from_config(path, total)
        values = [schedule(s) for s in range(total)]
        assert all(0.0 <= v <= 1.0 for v in values)
        assert values[0] > 0.0


def test_every_schedule_has_a_config() -> None:
    used = {yaml.safe_load(p.read_text())["_target_"].rpartition(".")[2] for p in CONFIGS}
    assert used == set(ours.__all__) - {"Schedule"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_warm_up_rises_in_equal_parts_from_the_first_step(path: Path) -> None:
    options = yaml.safe_load(path.read_text())
    kind = getattr(ours, options.pop("_target_").rpartition(".")[2])
    schedule = kind(**{**options, "total_steps": 100, "warmup_steps": 5})
    assert [schedule(s) / schedule(5) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_shares_are_of_the_steps_after_the_warm_up() -> None:
    by_share = ours.MultiStep(warmup_steps=20, total_steps=120, milestones=(0.5, 0.75))
    by_steps = ours.MultiStep(warmup_steps=20, milestones=(50, 75))
    assert [by_share(s) for s in range(120)] == [by_steps(s) for s in range(120)]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Constant", {"warmup_steps": -1}, "schedule.warmup_steps=-1"),
    ("Constant", {"warmup_steps": 0.5}, "schedule.warmup_steps=0.5"),
    ("Constant", {"total_steps": 0}, "schedule.total_steps=0"),
    ("Step", {"step_size": 0}, "schedule.step_size=0"),
    ("Step", {"step_size": 10, "gamma": 0.0}, "schedule.gamma=0.0"),
    ("Step", {"step_size": 10, "gamma": "x"}, "schedule.gamma=x"),
    ("Step", {"step_size": 0.5}, "filled in by the run"),
    ("MultiStep", {"milestones": [30, 10]}, "schedule.milestones"),
    ("MultiStep", {"milestones": []}, "schedule.milestones"),
    ("MultiStep", {"milestones": 3}, "schedule.milestones=3"),
    ("Exponential", {"gamma": 1.5}, "schedule.gamma=1.5"),
    ("Polynomial", {}, "filled in by the run"),
    ("Polynomial", {"total_steps": 5, "power": 0.0}, "schedule.power=0.0"),
    ("Polynomial", {"total_steps": 5, "power": math.nan}, "schedule.power=nan"),
    ("Cosine", {}, "filled in by the run"),
    ("Cosine", {"total_steps": 5, "warmup_steps": 5}, "schedule.warmup_steps=5"),
    ("Cosine", {"total_steps": 5, "min_multiplier": 2.0}, "schedule.min_multiplier=2.0"),
    ("CosineRestarts", {"period": 5, "period_factor": 1.5}, "schedule.period_factor=1.5"),
    ("OneCycle", {}, "filled in by the run"),
    ("OneCycle", {"total_steps": 5, "pct_start": 1.0}, "schedule.pct_start=1.0"),
    ("OneCycle", {"total_steps": 5, "anneal": "up"}, "schedule.anneal=up"),
    ("OneCycle", {"total_steps": 5, "div_factor": 0.5}, "schedule.div_factor=0.5"),
    ("WarmupStableDecay", {"total_steps": 5, "decay": "x"}, "schedule.decay=x"),
    ("WarmupStableDecay", {"total_steps": 5, "decay_share": 0}, "schedule.decay_share=0"),
    ("InverseSquareRoot", {}, "schedule.timescale=null"),
    ("InverseSquareRoot", {"timescale": 0}, "schedule.timescale=0"),
    ("Plateau", {"factor": 1.0}, "schedule.factor=1.0"),
    ("Plateau", {"factor": "x"}, "schedule.factor=x"),
    ("Plateau", {"patience": -1}, "schedule.patience=-1"),
    ("Plateau", {"threshold": math.inf}, "schedule.threshold=inf"),
    ("Plateau", {"threshold_mode": "max"}, "schedule.threshold_mode=max"),
]


@pytest.mark.parametrize(("kind", "arguments", "expected"), REFUSED)
def test_refuses_in_one_line_that_names_the_key(kind: str, arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        getattr(ours, kind)(**arguments)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


LOSSES = st.lists(st.one_of(st.floats(0.0, 3.0), st.sampled_from([1.0, 0.5, math.nan, math.inf])), max_size=60)


@property_test
@given(
    LOSSES,
    st.floats(0.1, 0.9),
    st.integers(0, 4),
    st.floats(0.0, 0.2),
    st.sampled_from(["rel", "abs"]),
    st.integers(0, 3),
    st.floats(0.0, 0.5),
    st.integers(0, 60),
)
def test_plateau_is_torchs_even_when_resumed_in_the_middle(
    losses: list[float],
    factor: float,
    patience: int,
    threshold: float,
    mode: Any,
    cooldown: int,
    low: float,
    cut: int,
) -> None:
    def fresh() -> ours.Plateau:
        return ours.Plateau(factor, patience, threshold, mode, cooldown, low)

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = ref.ReduceLROnPlateau(optimizer, "min", factor, patience, threshold, mode, cooldown, low, eps=0.0)
    schedule = fresh()
    for index, loss in enumerate(losses):
        if index == cut:
            memory = json.loads(json.dumps(schedule.state_dict(), allow_nan=False))
            schedule = fresh()
            schedule.load_state_dict(memory)
        schedule.observe(loss)
        reference.step(loss)
        assert schedule(index) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_plateau_refuses_the_memory_of_another_schedule() -> None:
    with pytest.raises(CheckpointError, match="another schedule"):
        ours.Plateau().load_state_dict({})
