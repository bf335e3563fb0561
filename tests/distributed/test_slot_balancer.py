"""Slots move to fast ranks between two steps, and the bits stay the same."""

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from descent.training.slot_balancer import Shares, SlotBalancer
from tests.distributed.replicas import Case, Crew

RUN = ["batch.size=37", "model.norm=batch", "model.dropout=0.2", "evaluate.every=5", "epochs=null", "reduction=exact"]


class Restless(SlotBalancer):
    """Assigns the slots anew after every step, at random; alike on all ranks."""

    def observe(self, seconds: Any, now: float) -> Shares | None:
        super().observe(seconds, now)
        if not hasattr(self, "_random"):
            self._random = random.Random(self.slots)
        world = len(self.shares)
        cuts = sorted(self._random.sample(range(1, self.slots), world - 1))
        self.shares = tuple(zip([0, *cuts], [*cuts, self.slots], strict=True))
        return self.shares


@dataclass(frozen=True)
class MoveAtRandom:
    def __call__(self, trainer: Any) -> None:
        trainer.make_slot_balancer = Restless


@dataclass(frozen=True)
class SlowForward:
    """Each micro-batch takes longer."""

    seconds: float

    def __call__(self, trainer: Any) -> None:
        def wait(module: Any, _: object) -> None:
            if module.training:
                time.sleep(self.seconds)

        trainer.state.model.register_forward_pre_hook(wait)


@pytest.mark.parametrize(
    "data",
    [
        [],
        [
            "data=stdlib",
            "model=gpt_tiny",
            "data.block=12",
            "data.max_bytes=9000",
            "model.layers=1",
            "model.heads=2",
            "model.width=16",
            "batch.micro_size=3",
        ],
    ],
)
@pytest.mark.parametrize(("slots", "world"), [(5, 2), (7, 3), (9, 4), (4, 4)])
def test_whichever_rank_computes_which_slots_the_bits_are_the_same(
    pool: Crew, tmp_path: Path, slots: int, world: int, data: list[str]
) -> None:
    overrides = [*data, *(o for o in RUN if not data or not o.startswith("model.norm"))]
    case = Case.of([*overrides, "steps=15"], tmp_path, slots)
    alone = pool.train(case, 1)[0]
    reports = pool.train(case, world, tamper={r: MoveAtRandom() for r in range(world)})
    for one in reports:
        assert one.metrics == alone.metrics
        assert one.sha256 == alone.sha256
        assert len([n for n in one.notices if n.kind == "slots assigned"]) == 15


@pytest.mark.parametrize("compress", ["null", "bf16", "powersgd"])
def test_with_the_fast_reduction_slots_move_too(pool: Crew, tmp_path: Path, compress: str) -> None:
    case = Case.of([*RUN, "reduction=fast", "steps=15", "optimizer.lr=1e-3", f"compress={compress}"], tmp_path, 7)
    alone = pool.train(case, 1)[0]
    reports = pool.train(case, 3, tamper={r: MoveAtRandom() for r in range(3)})
    assert len({t.sha256 for t in reports}) == 1
    assert reports[0].losses == pytest.approx(alone.losses, rel=1e-4 if compress == "null" else 0.1)


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_a_slow_rank_gets_fewer_slots_and_is_named(pool: Crew, tmp_path: Path, reduction: str) -> None:
    case = Case.of(
        [*RUN, "steps=30", f"reduction={reduction}", "straggler.after_s=0.1", "diagnostics.every=5"],
        tmp_path,
        9,
    )
    alone = pool.train(case, 1)[0]
    reports = pool.train(case, 3, tamper={1: SlowForward(0.03)})
    assert len({t.sha256 for t in reports}) == 1
    if reduction == "exact":
        assert reports[0].sha256 == alone.sha256
    for one in reports:
        assert str(one.notices) == str(reports[0].notices)
        shares = [n.extra["shares"][1] for n in one.notices if n.kind == "slots assigned"]
        assert shares and min(hi - lo for lo, hi in shares) < 3
        # a busy machine may make others slow too
        named = {n.rank: n for n in one.notices if n.kind == "straggler"}
        assert named[1].extra["ratio"] > 1.5
        ratios = [r.metrics.get("cluster/slowest_rank_ratio", 0.0) for r in one.records]
        assert max(ratios) > 1.5


def test_it_can_be_turned_off(pool: Crew, tmp_path: Path) -> None:
    case = Case.of([*RUN, "steps=20", "straggler.balance=false"], tmp_path, 9)
    for one in pool.train(case, 3, tamper={1: SlowForward(0.01)}):
        assert not [n for n in one.notices if n.kind == "slots assigned"]
