"""A fault among ranks that share a GPU: abort, and a new generation, by NCCL and by gloo."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.led import RUN, LedRun, assert_survives
from tests.distributed.replicas import Case, Crew, Injected, crew, cut, fail
from tests.distributed.test_equal_for_any_world import MODELS

_SHARED_CARD = (2, 30)
"""From here on NCCL takes several ranks on one card, where NCCL_MULTI_RANK_GPU_ENABLE=1 asks for it."""
_SHARES = {"nccl": 1, "gloo": 0.5}
"""GPUs of a worker, from which the plan's backend follows."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Crew]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
        with crew(2) as found:
            yield found


@pytest.mark.parametrize(
    "fault",
    [
        fail(1).at(7, "forward"),
        fail(1).at(7, "reduce", delay_s=0.001),
        fail(0).at(7, "update"),
        cut(1).at(7, "reduce"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", [pytest.param("nccl", marks=pytest.mark.real_gpu), "gloo"])
def test_a_kill_costs_no_step_and_no_bit(pool: Crew, tmp_path: Path, backend: str, fault: Injected) -> None:
    if backend == "nccl" and torch.cuda.nccl.version() < _SHARED_CARD:
        pytest.skip("this NCCL takes one rank a card only")
    case = Case.of([*RUN, f"resources.gpus={_SHARES[backend]}"], tmp_path, device="cuda")
    assert case.plan.backend == backend
    undisturbed = pool.train(case, 1)[0]
    assert_survives(pool, case, undisturbed, 2, fault)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_every_model_has_the_same_bits_for_one_worker_and_for_two_of_which_one_dies(
    pool: Crew, tmp_path: Path, model: list[str]
) -> None:
    run = [*model, "batch.size=24", "steps=8", "epochs=null", "evaluate.every=3", "reduction=exact"]
    case = Case.of([*run, f"resources.gpus={_SHARES['gloo']}"], tmp_path, device="cuda")
    undisturbed = pool.train(case, 1)[0]
    survived = assert_survives(pool, case, undisturbed, 2, fail(1).at(4, "reduce"))
    assert survived.lost == 1


@pytest.mark.parametrize("fault", [fail(1).at(7, "forward"), cut(0).at(7, "reduce")], ids=str)
def test_with_torchs_own_reducer_no_step_is_lost_either(pool: Crew, tmp_path: Path, fault: Injected) -> None:
    run = [*RUN, "reduction=fast", f"resources.gpus={_SHARES['gloo']}"]
    case = Case.of(run, tmp_path, device="cuda")
    undisturbed = pool.train(case, 1)[0]
    led = LedRun(pool, case)
    led.start(2, fault)
    last = led.finish()
    assert last.step == 20 and sorted(led.metrics) == sorted(
        (step, "eval/loss" in m) for step, m in undisturbed.metrics
    )
    for key, metrics in led.metrics.items():
        expected = next(m for s, m in undisturbed.metrics if (s, "eval/loss" in m) == key)
        for name in metrics.keys() & {"train/loss", "eval/loss"}:
            assert metrics[name] == pytest.approx(expected[name], rel=1e-2)
