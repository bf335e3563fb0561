"""A checkpoint's run goes on with other replicas, in another number."""

from dataclasses import replace
from pathlib import Path

import pytest

from service.artifacts import checkpoint
from tests.distributed.conductor import RUN, Conductor, parts_of
from tests.distributed.replicas import Case, Crew


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 1), (1, 4)])
def test_resumed_from_a_checkpoint_by_other_replicas(
    pool: Crew, tmp_path: Path, before: int, after: int, schedule: str
) -> None:
    case = Case.of([*RUN, "checkpoint.every=5", f"schedule={schedule}"], tmp_path)
    whole = pool.train(replace(case, run_dir=tmp_path / "whole"), before)
    root = tmp_path / "whole" / "checkpoints"
    target = checkpoint.commit(root, parts_of(whole, 10), run="r", config_sha256="0" * 64)
    resumed = Conductor(pool, case)
    resumed.start(after, restore_from=target)
    resumed.joined.update(resumed.replicas)
    last = resumed.finish()
    assert last.sha256 == whole[0].sha256
    assert last.metrics == [(step, m) for step, m in whole[0].metrics if step > 10]
