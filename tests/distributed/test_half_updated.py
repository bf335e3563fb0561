"""Memory that runs out inside the optimizer: that replica is lost, not retried, and nothing tells."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.replicas import Case, Crew

RUN = ["batch.size=30", "steps=10", "epochs=null", "reduction=exact"]


@dataclass(frozen=True)
class FailInUpdate:
    """Half of the parameters are updated, then there is no memory left."""

    step: int

    def __call__(self, trainer: Any) -> None:
        def update() -> None:
            if trainer.control.step == self.step - 1:
                with torch.no_grad():
                    trainer.state.optimizer.param_groups[0]["params"][0].add_(1.0)
                raise torch.OutOfMemoryError("no memory left")
            real()

        real, trainer.state.optimizer.step = trainer.state.optimizer.step, update


@pytest.mark.parametrize("world", [2, 3])
def test_the_others_go_on_and_a_newcomer_receives_their_state(pool: Crew, tmp_path: Path, world: int) -> None:
    case = Case.of(RUN, tmp_path)
    undisturbed = pool.train(case, 1)[0]
    replicas = pool.build(case, world, tamper={1: FailInUpdate(step=6)})
    pool.form(case, replicas)
    ended = pool.until_ended(replicas)
    assert ended[1].state == "failed" and ended[1].error.startswith("HalfUpdated")
    assert "OutOfMemoryError: no memory left" in ended[1].error
    sound = sorted((i for i in ended if i != 1), key=lambda i: -ended[i].step)
    assert ended[sound[0]].step >= 6 and ended[sound[0]].state == "broken"
    order = [*(replicas[i] for i in sound), *pool.build(case, 1)]
    pool.form(case, order, behind=(len(order) - 1,))
    for reports in (replica.next_report() for replica in order):
        assert (reports.state, reports.sha256) == ("finished", undisturbed.sha256), reports.error
    pool.give([*replicas, *order[-1:]])
