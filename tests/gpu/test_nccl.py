"""A fault among ranks on GPUs: NCCL's abort, and a new generation. Run by hand: python -m pytest tests/gpu."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.conductor import RUN, assert_survives
from tests.distributed.replicas import Case, Crew, Injected, crew, cut, fail

_SHARED_CARD = (2, 30)
"""From here on NCCL takes several ranks on one card, where NCCL_MULTI_RANK_GPU_ENABLE=1 asks for it."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Crew]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
        with crew(2) as found:
            yield found


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.nccl.version() < _SHARED_CARD,
    reason="this NCCL takes one rank a card only",
)
@pytest.mark.parametrize("fault", [
    fail(1).at(7, "forward"), fail(1).at(7, "reduce", delay_s=0.001), fail(0).at(7, "update"),
    cut(1).at(7, "reduce"),
], ids=str)  # fmt: skip
def test_a_kill_costs_no_step_and_no_bit(pool: Crew, tmp_path: Path, fault: Injected) -> None:
    case = Case.of(RUN, tmp_path, device="cuda")
    undisturbed = pool.train(case, 1)[0]
    assert_survives(pool, case, undisturbed, 2, fault)
