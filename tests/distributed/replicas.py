"""Real processes, real gloo, no Ray: W replicas of one run in one generation each."""

import dataclasses
import multiprocessing as mp
import tempfile
from pathlib import Path
from typing import Any

from service.cluster.policy import deal_slots
from service.config import compose, recompose
from service.messages import Membership


@dataclasses.dataclass
class Replica:
    """What one process has to show at the end."""

    losses: list[float]
    metrics: list[tuple[int, dict[str, float]]]
    sha256: str
    step: int


def _replica(
    rank: int,
    world: int,
    port: int,
    config: dict[str, Any],
    plan: dict[str, Any],
    run_dir: str,
    out: Any,
) -> None:
    import torch

    from service.training.plan import Plan
    from service.training.trainer import Control, Trainer

    control = Control()
    derived = Plan.from_dict(plan)
    trainer = Trainer(recompose(config), derived, Path(run_dir), torch.device("cpu"), control)
    trainer.run(
        Membership(
            1, rank, world, "127.0.0.1", port, deal_slots(derived.slots, world), derived.micro_size
        )
    )
    trainer.finish_saving()
    metrics = [(r.step, r.metrics) for r in control.records]
    losses = [m["train/loss"] for _, m in metrics if "train/loss" in m]
    out.put((rank, Replica(losses, metrics, trainer.sha256(), trainer.state.step)))


def train(overrides: list[str], world: int, slots: int = 4) -> list[Replica]:
    """Run the composed config on `world` processes; the replicas by rank."""
    from service.training.collectives import Store
    from service.training.plan import prepare

    composed = compose(
        [
            *overrides,
            f"workers={slots}",
            f"slots={slots}",
            "resources.cpus=0.25",
            "checkpoint.every=null",
        ]
    )
    plan = prepare(composed.config, cores=1.0, gpus=0.0).plan
    store = Store("127.0.0.1")
    context = mp.get_context("spawn")
    out = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_replica,
                args=(r, world, store.port, composed.config.to_dict(), plan.to_dict(), folder, out),
            )
            for r in range(world)
        ]
        for process in processes:
            process.start()
        found = dict(out.get(timeout=120) for _ in range(world))
        for process in processes:
            process.join(30)
            assert process.exitcode == 0
    return [found[r] for r in range(world)]
