"""The same first step with Ray Train: TorchTrainer, two CPU workers, `prepare_model`, nothing else.

Writes the time (seconds since the epoch) at which rank 0 has taken its first step to the file
named by the argument. No dashboard, as in Descent, and no checkpoint.
"""

import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(config: dict[str, Any]) -> None:
    """What each worker does."""
    import ray.train.torch
    import torch
    from torch import nn

    from tests.bench.subjects import LEARNING_RATE, SUBJECTS, digits

    torch.set_num_threads(1)
    subject = SUBJECTS[config["subject"]]
    model = ray.train.torch.prepare_model(subject.build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    inputs, targets = digits()
    share = subject.batch // 2
    rank = ray.train.get_context().get_world_rank()
    own = slice(rank * share, (rank + 1) * share)
    loss = nn.functional.cross_entropy(model(inputs[own]), targets[own])
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    if rank == 0:
        Path(config["out"]).write_text(str(time.time()))
    ray.train.report({"loss": loss.item()})


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    TorchTrainer(
        train,
        train_loop_config={"out": str(out), "subject": sys.argv[2]},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(storage_path=str(out.parent / "ray_results")),
    ).fit()
    ray.shutdown()


if __name__ == "__main__":
    main()
