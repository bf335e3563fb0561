"""Compressed gradients: the training stays close to the uncompressed one, the replicas stay equal."""

import math
from pathlib import Path

import pytest

from tests.distributed.replicas import Case, Crew, Report, fail
from tests.distributed.test_not_finite import OnceNotFinite

RUN = [
    "batch.size=60",
    "steps=90",
    "epochs=null",
    "reduction=fast",
    "optimizer.lr=3e-3",
    "evaluate.every=end",
    "straggler.balance=false",
]
MODELS = {
    "mlp": ["model.dropout=0.2"],
    "resnet": ["model=resnet", "model.widths=[16,32]", "model.blocks=1"],
    "gpt, tied": [
        "model=gpt_tiny",
        "data=stdlib",
        "data.block=12",
        "data.max_bytes=9000",
        "model.layers=1",
        "model.heads=2",
        "model.width=32",
        "model.tied=true",
    ],
}


def equal(reports: list[Report]) -> Report:
    """Replicas of one generation never differ by a bit."""
    assert {(t.state, t.sha256) for t in reports} == {("finished", reports[0].sha256)}, reports[0].error
    assert all(t.metrics == reports[0].metrics for t in reports)
    return reports[0]


@pytest.mark.parametrize("world", [2, 3])
def test_bf16_stays_close_to_the_full_gradients(pool: Crew, tmp_path: Path, world: int) -> None:
    run = [*RUN, "steps=30"]
    full = equal(pool.train(Case.of(run, tmp_path), world))
    half = equal(pool.train(Case.of([*run, "compress=bf16"], tmp_path), world))
    assert half.losses == pytest.approx(full.losses, rel=0.05, abs=0.02)
    assert half.losses != full.losses


@pytest.mark.parametrize("world", [2, 4])
def test_powersgd_learns_about_as_much(pool: Crew, tmp_path: Path, world: int) -> None:
    full = equal(pool.train(Case.of(RUN, tmp_path), world)).metrics[-1][1]
    low = equal(pool.train(Case.of([*RUN, "compress=powersgd"], tmp_path), world)).metrics[-1][1]
    assert full["eval/accuracy"] > 0.9
    assert low["eval/accuracy"] > full["eval/accuracy"] - 0.04
    assert low["eval/loss"] < 1.5 * full["eval/loss"]


@pytest.mark.parametrize("compress", ["bf16", "powersgd"])
@pytest.mark.parametrize("model", MODELS)
def test_any_model_and_uneven_slots(pool: Crew, tmp_path: Path, model: str, compress: str) -> None:
    case = Case.of(
        [*RUN, *MODELS[model], f"compress={compress}", "batch.size=23", "batch.micro_size=4", "steps=25"],
        tmp_path,
        5,
    )
    reports = equal(pool.train(case, 3))
    assert sum(reports.losses[-5:]) < sum(reports.losses[:5]) and all(map(math.isfinite, reports.losses))


def test_alone_there_is_nothing_to_compress(pool: Crew, tmp_path: Path) -> None:
    plain = pool.train(Case.of([*RUN, "steps=5"], tmp_path), 1)[0]
    for compress in ("bf16", "powersgd"):
        case = Case.of([*RUN, "steps=5", f"compress={compress}"], tmp_path)
        assert pool.train(case, 1)[0].sha256 == plain.sha256


@pytest.mark.parametrize("compress", ["bf16", "powersgd"])
@pytest.mark.parametrize(("phase", "delay_s"), [("reduce", 0.0), ("reduce", 0.001), ("update", 0.0)])
def test_killed_in_the_middle_and_no_step_is_lost(
    pool: Crew, tmp_path: Path, compress: str, phase: str, delay_s: float
) -> None:
    case = Case.of([*RUN, f"compress={compress}", "steps=20"], tmp_path)
    replicas = pool.build(case, 3, faults=[fail(worker=1).at(step=9, phase=phase, delay_s=delay_s)])
    pool.form(case, replicas)
    ended = pool.until_ended(replicas)
    assert {i: t.state for i, t in ended.items()} == {0: "broken", 2: "broken"}
    # the most advanced first, as the controller does it
    order = sorted(ended, key=lambda i: -ended[i].step)
    behind = tuple(r for r, i in enumerate(order) if ended[i].step < ended[order[0]].step)
    pool.form(case, [replicas[i] for i in order], behind)
    last = [replicas[i].next_report() for i in order]
    assert {(t.state, t.step, t.sha256) for t in last} == {("finished", 20, last[0].sha256)}
    steps = {s for t in [*ended.values(), *last] for s, m in t.metrics if "train/loss" in m}
    assert steps == set(range(1, 21))
    pool.give(replicas)


@pytest.mark.parametrize("compress", ["bf16", "powersgd"])
def test_a_step_that_is_not_finite_once_is_repeated(pool: Crew, tmp_path: Path, compress: str) -> None:
    case = Case.of([*RUN, "model.depth=2", f"compress={compress}", "steps=12"], tmp_path)
    undisturbed = pool.train(case, 3)[0]
    reports = pool.train(case, 3, tamper={1: OnceNotFinite("gradient")})
    last = equal(reports)
    assert all(math.isfinite(loss) for loss in last.losses)
    (notice,) = last.notices
    assert notice.kind == "step repeated"
    if compress == "bf16":
        assert notice.rank == 1 and last.sha256 == undisturbed.sha256
