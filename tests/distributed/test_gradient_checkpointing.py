"""Models that compute parts of their forward again in the backward: the same bits as without, for any number of workers."""

from pathlib import Path

import pytest

from tests.distributed.replicas import Case, Crew

RUN = ["trusted_modules=[tests]", "batch.size=12", "steps=4", "epochs=null", "clip.norm=1.0"]
OWN = ["model=custom", "model._target_=tests.own_optim.Checkpointed", *RUN]


def hashes(pool: Crew, tmp_path: Path, overrides: list[str], worlds: tuple[int, ...]) -> set[str]:
    case = Case.of(overrides, tmp_path, 2)
    return {pool.train(case, world)[0].sha256 for world in worlds}


@pytest.mark.parametrize("kind", ["exact", "fast"])
def test_the_bits_are_those_without(pool: Crew, tmp_path: Path, kind: str) -> None:
    own = [*OWN, f"reduction={kind}"]
    worlds = (1, 2) if kind == "exact" else (2,)
    without = hashes(pool, tmp_path, [*own, "+model.again=false"], worlds)
    assert hashes(pool, tmp_path, own, worlds) == without and len(without) == 1
    reentrant = [*own, "+model.use_reentrant=true"]
    assert hashes(pool, tmp_path, reentrant, worlds) == without
