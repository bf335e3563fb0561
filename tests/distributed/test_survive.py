"""A fault of each kind in each phase; the survivors go on, and nothing shows afterwards.

Nothing: the hash of the final state, the figures of every step and evaluation, each
logged once, are those of the undisturbed run.
"""

import random
from pathlib import Path

import pytest

from descent.checkpoint.reader import read_checkpoint
from tests.distributed import tally
from tests.distributed.led import RUN, LedRun, assert_nothing_shows, assert_survives
from tests.distributed.replicas import (
    Case,
    Crew,
    Injected,
    Report,
    blunder,
    crash,
    cut,
    fail,
    hang,
    leave,
    slow_down,
)
from tests.distributed.test_equal_for_any_world import MODELS

each = pytest.mark.parametrize


@each(
    "fault",
    [
        fail(1).at(1, "join"),
        fail(0).at(1, "receive"),
        fail(2).at(1, "receive"),
        fail(0).at(20, "step"),
        fail(1).at(7, "forward"),
        fail(0).at(7, "update"),
        fail(1).at(7, "update"),
        fail(0).at(0, "evaluate"),
        fail(1).at(5, "evaluate"),
        fail(2).at(10, "evaluate", delay_s=0.002),
        fail(0).at(20, "evaluate"),
        fail(0).at(20, "save"),
        fail(2).at(20, "save", delay_s=0.001),
        crash(1).at(7, "reduce"),
        crash(2).at(3, "forward"),
    ],
    ids=str,
)
def test_a_worker_dies(pool: Crew, case: Case, undisturbed: Report, fault: Injected) -> None:
    assert assert_survives(pool, case, undisturbed, 3, fault).lost == 1


@each("world", [2, 3, 4])
@each("delay_ms", [0, 0.3, 1, 3])
def test_a_worker_dies_in_the_middle_of_a_reduction(
    pool: Crew, case: Case, undisturbed: Report, world: int, delay_ms: float
) -> None:
    fault = fail(worker=world - 1).at(step=7, phase="reduce", delay_s=delay_ms / 1000)
    assert assert_survives(pool, case, undisturbed, world, fault).lost == 1


@each("delay_ms", [0, 4, 16])
def test_a_worker_dies_between_two_buckets(pool: Crew, tmp_path: Path, delay_ms: float) -> None:
    # 18 MB of gradients travel in buckets of 8 MB.
    case = Case.of(
        ["model.width=1500", "model.depth=3", "batch.size=8", "steps=5", "epochs=null", "reduction=exact"],
        tmp_path,
    )
    fault = fail(worker=1).at(step=3, phase="reduce", delay_s=delay_ms / 1000)
    assert_survives(pool, case, pool.train(case, 1)[0], 3, fault)


@each(
    "fault",
    [
        hang(0).at(1, "join"),
        hang(1).at(1, "receive"),
        hang(1).at(4, "step"),
        hang(2).at(7, "forward"),
        hang(0).at(7, "reduce"),
        hang(1).at(7, "reduce", delay_s=0.001),
        hang(1).at(7, "update"),
        hang(2).at(10, "evaluate"),
        hang(0).at(20, "save"),
    ],
    ids=str,
)
def test_a_worker_hangs(pool: Crew, case: Case, undisturbed: Report, fault: Injected) -> None:
    assert assert_survives(pool, case, undisturbed, 3, fault).lost == 1


@each(
    "fault",
    [
        cut(2).at(1, "receive"),
        cut(1).at(4, "step"),
        cut(0).at(7, "forward"),
        cut(2).at(7, "reduce"),
        cut(0).at(7, "reduce", delay_s=0.001),
        cut(1).at(7, "update"),
        cut(0).at(10, "evaluate"),
        cut(1).at(20, "save"),
    ],
    ids=str,
)
def test_a_worker_is_cut_off_from_the_others_and_stays(
    pool: Crew, case: Case, undisturbed: Report, fault: Injected
) -> None:
    run = assert_survives(pool, case, undisturbed, 3, fault)
    assert run.lost == 0
    assert len(run.members) == 3


def test_a_slow_worker_is_waited_for(pool: Crew, case: Case, undisturbed: Report) -> None:
    fault = slow_down(worker=1, seconds=0.05, count=5).at(step=4)
    run = assert_survives(pool, case, undisturbed, 3, fault)
    assert run.lost == 0 and len(run.formed) == 1


@each("fault", [leave(0).at(1, "forward"), leave(1).at(7, "reduce"), leave(2).at(10, "evaluate")], ids=str)
def test_a_worker_says_goodbye(pool: Crew, case: Case, undisturbed: Report, fault: Injected) -> None:
    run = assert_survives(pool, case, undisturbed, 3, fault)
    assert (run.lost, run.left, len(run.members)) == (0, 1, 2)


def test_an_error_in_the_users_code_is_no_fault_to_survive(pool: Crew, case: Case) -> None:
    replicas = pool.build(case, 2, faults=[blunder(worker=1).at(step=3, phase="forward")])
    pool.form(case, replicas)
    reports = pool.until_ended(replicas)
    assert (reports[1].state, reports[1].error) == ("failed", "RuntimeError: injected error")
    assert (reports[0].state, reports[0].step) == ("broken", 2)  # nobody waits for ever
    pool.give(replicas)


@each(
    "faults",
    [
        [fail(0).at(7, "reduce"), fail(2).at(7, "reduce")],
        [fail(1).at(7, "forward"), fail(3).at(7, "update")],
        [hang(0).at(7, "reduce"), fail(1).at(7, "reduce")],
        [hang(1).at(10, "evaluate"), hang(2).at(10, "evaluate")],
        [cut(1).at(7, "reduce"), fail(3).at(7, "reduce", delay_s=0.0005)],
    ],
    ids=lambda f: "-and-".join(map(str, f)),
)
def test_two_at_once(pool: Crew, case: Case, undisturbed: Report, faults: list[Injected]) -> None:
    deaths = sum(f.fault.kind in ("kill", "stop") for f in faults)
    assert assert_survives(pool, case, undisturbed, 4, *faults).lost == deaths


def test_one_after_the_other_until_one_is_left(pool: Crew, case: Case, undisturbed: Report) -> None:
    run = assert_survives(
        pool,
        case,
        undisturbed,
        4,
        fail(worker=0).at(step=4, phase="update"),
        hang(worker=2).at(step=8, phase="reduce"),
        crash(worker=1).at(step=12, phase="forward"),
    )
    assert run.lost == 3
    assert [len(members) for members in run.formed] == [4, 3, 2, 1]


@each(
    "during",
    [
        fail(2).at(7, "join"),
        hang(2).at(7, "join"),
        fail(0).at(7, "receive"),
        hang(3).at(7, "receive"),
        cut(0).at(7, "receive"),
    ],
    ids=str,
)
def test_a_second_fault_during_the_regroup_after_the_first(
    pool: Crew, case: Case, undisturbed: Report, during: Injected
) -> None:
    # w1 is killed when w0 may have committed a step more than the others: they must receive it.
    faults = [fail(worker=1).at(step=7, phase="update"), cut(worker=2).at(step=7, phase="reduce")]
    assert_survives(pool, case, undisturbed, 4, *faults, during)


def test_the_source_dies_while_a_newcomer_receives(pool: Crew, case: Case, undisturbed: Report) -> None:
    run = LedRun(pool, case)
    run.start(2, fail(worker=0).at(step=2, phase="receive", delay_s=0.001))
    run.until_formed(1, pausing=0)
    run.start(1)
    assert_nothing_shows(run, undisturbed)
    assert run.formed[1] == ("w0", "w1", "w2") and "w0" not in run.members
    assert run.lost == 1


def test_a_newcomer_receives_the_state_and_a_whole_new_crew_takes_over(
    pool: Crew, case: Case, undisturbed: Report
) -> None:
    run = LedRun(pool, case)
    # w0 dies as soon as the newcomers have its state and one more step is taken.
    run.start(1, fail(worker=0).at(step=3, phase="forward"))
    run.until_formed(1, pausing=0)
    run.start(2)
    grown = run.until_formed(2)
    assert list(grown) == ["w0", "w1", "w2"] and grown["w1"].behind == (1, 2)
    shrunk = run.until_formed(3)
    assert list(shrunk) == ["w1", "w2"] and shrunk["w1"].behind == ()
    assert_nothing_shows(run, undisturbed)


@each("model", MODELS.values(), ids=MODELS.keys())
def test_every_model_goes_through_a_kill_growth_and_shrinkage_unchanged(
    pool: Crew, tmp_path: Path, model: list[str]
) -> None:
    """Batch statistics, dropout's random streams and tied weights are part of what is handed on."""
    case = Case.of(
        [*model, "batch.size=24", "steps=16", "epochs=null", "evaluate.every=5", "reduction=exact"], tmp_path, 4
    )
    undisturbed = pool.train(case, 1)[0]
    run = LedRun(pool, case)
    run.start(2, fail(worker=1).at(step=4, phase="reduce"))
    faults = [
        cut(worker=0).at(step=8, phase="forward"),
        leave(worker=1).at(step=12, phase="reduce"),
    ]
    run.group.at_loss.append(lambda: run.start(2, *faults))
    grown = run.until_formed(2)
    assert list(grown) == ["w0", "w2", "w3"] and grown["w0"].behind == (1, 2)
    assert_nothing_shows(run, undisturbed)
    assert (run.lost, run.left, len(run.members)) == (1, 1, 2)


@each("model", MODELS.values(), ids=MODELS.keys())
def test_every_model_is_handed_to_a_spare_unchanged(pool: Crew, tmp_path: Path, model: list[str]) -> None:
    """Built and idle, the spare takes a dead member's place in the very next generation."""
    case = Case.of(
        [*model, "batch.size=24", "steps=8", "epochs=null", "evaluate.every=5", "reduction=exact"], tmp_path, 4
    )
    undisturbed = pool.train(case, 1)[0]
    run = LedRun(pool, case, most=2)
    run.start(3, fail(worker=0).at(step=4, phase="reduce"))
    assert_nothing_shows(run, undisturbed)
    assert run.formed == [("w0", "w1"), ("w1", "w2")]
    assert run.group.memberships[2]["w1"].behind == (1,)


@each("seed", range(12))
def test_faults_at_random_moments(pool: Crew, case: Case, undisturbed: Report, seed: int) -> None:
    rng = random.Random(seed)
    world = rng.choice([2, 3, 4])
    faults = []
    for worker in rng.sample(range(world), rng.randrange(1, world)):
        kind = rng.choice([fail, fail, crash, hang, cut])
        phase = rng.choice(["step", "forward", "reduce", "update"])
        faults.append(kind(worker).at(rng.randrange(1, 17), phase, rng.choice([0.0, rng.random() * 0.006])))
    lost = assert_survives(pool, case, undisturbed, world, *faults).lost
    assert lost == sum(f.fault.kind != "partition" for f in faults)


def test_each_sample_of_an_epoch_is_spent_once(pool: Crew, tmp_path: Path) -> None:
    steps = 3 * tally.SAMPLES // tally.BATCH
    case = Case.of([*tally.OVERRIDES, f"steps={steps}", "epochs=null"], tmp_path)
    run = LedRun(pool, case)
    run.start(
        4,
        fail(worker=0).at(step=9, phase="reduce"),
        cut(worker=2).at(step=17, phase="reduce"),
        hang(worker=3).at(step=23, phase="update"),
        cut(worker=1).at(step=31, phase="forward"),
        leave(worker=2).at(step=38, phase="reduce"),
    )
    outcome = run.finish()
    assert (run.lost, run.left, len(run.members)) == (2, 1, 1)
    assert outcome.step == steps and outcome.checkpoint is not None
    tensors, _ = read_checkpoint(outcome.checkpoint)
    assert tensors["model/spent"].tolist() == [3.0] * tally.SAMPLES  # three epochs


@each(
    "fault",
    [
        fail(1).at(1),
        fail(0).at(2),
        fail(1).at(8, "forward", delay_s=0.001),
        fail(1).at(14, "reduce"),
        cut(0).at(9, "reduce"),
        hang(1).at(6, "update"),
    ],
    ids=str,
)
@each("world", [2, 4])
def test_with_the_fast_reduction_no_step_is_lost_either(
    pool: Crew, tmp_path: Path, fault: Injected, world: int
) -> None:
    case = Case.of([*RUN, "reduction=fast", "optimizer.lr=1e-3"], tmp_path)
    undisturbed = pool.train(case, world)[0]
    run = LedRun(pool, case)
    run.start(world, fault)
    assert run.finish().step == undisturbed.step
    losses = [m["train/loss"] for (_, evaluated), m in sorted(run.metrics.items()) if not evaluated]
    assert losses == pytest.approx(undisturbed.losses, rel=1e-4)
