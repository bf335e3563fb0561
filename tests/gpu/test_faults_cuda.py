"""A fault among ranks that share a GPU: abort, and a new generation, by NCCL and by gloo. Run by hand: python -m pytest tests/gpu."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.conductor import RUN, assert_survives
from tests.distributed.replicas import Case, Crew, Injected, crew, cut, fail

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


@pytest.mark.parametrize("fault", [
    fail(1).at(7, "forward"), fail(1).at(7, "reduce", delay_s=0.001), fail(0).at(7, "update"),
    cut(1).at(7, "reduce"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("backend", _SHARES)
def test_a_kill_costs_no_step_and_no_bit(
    pool: Crew, tmp_path: Path, backend: str, fault: Injected
) -> None:
    if backend == "nccl" and torch.cuda.nccl.version() < _SHARED_CARD:
        pytest.skip("this NCCL takes one rank a card only")
    case = Case.of([*RUN, f"resources.gpus={_SHARES[backend]}"], tmp_path, device="cuda")
    assert case.plan.backend == backend
    undisturbed = pool.train(case, 1)[0]
    assert_survives(pool, case, undisturbed, 2, fault)
