"""The peers of `recovery.py`: what their users write to survive the loss of a worker.

Both train the same network on the same data as Descent, keep a checkpoint every
`SAVE_EVERY` steps, start again from it when a worker is lost, and note every step with its time.

`python -m tests.bench.elastic SUBJECT FOLDER` is the script for `torchrun --max-restarts`,
`python -m tests.bench.elastic SUBJECT FOLDER WORKERS` the driver of Ray Train's TorchTrainer
with a `FailureConfig`, and with `torchft` behind it the same with Ray Train's `TorchftConfig`: there
the training code itself takes torchft's manager, DDP, optimizer and sampling, each worker is
a replica group of its own, and the survivors go on while Ray replaces the lost one.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAVE_EVERY = 50
"""About every second or two: far more often than people do, so in the peers' favour."""
STEPS_FILE = "steps.txt"
_MAX_RESTARTS = 8


def _train(
    subject_name: str,
    folder: Path,
    rank: int,
    world: int,
    wrap: Callable[[Any], Any],
    load: Callable[[], Any],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Steps without end; rank 0 notes them, and every rank where it can be found."""
    import torch
    from torch import nn

    from tests.bench.bare_loop import batches
    from tests.bench.subjects import LEARNING_RATE, SUBJECTS, digits

    torch.set_num_threads(1)
    subject = SUBJECTS[subject_name]
    inner = subject.build()
    model = wrap(inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    step = 0
    if (state := load()) is not None:
        inner.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    torch.manual_seed(0)
    feed = batches(*digits(), subject.batch, rank, world)
    objective = nn.CrossEntropyLoss()
    (folder / f"pid-{rank}.txt").write_text(str(os.getpid()))
    with (folder / STEPS_FILE).open("a", buffering=1) as steps:
        while True:
            inputs, targets = next(feed)
            optimizer.zero_grad()
            loss = objective(model(inputs), targets)
            loss.backward()
            optimizer.step()
            loss.item()
            step += 1
            if rank == 0:
                steps.write(f"{step} {time.time():.6f}\n")
            if step % SAVE_EVERY == 0:
                save({"model": inner.state_dict(), "optimizer": optimizer.state_dict(), "step": step})


def with_torchrun(subject: str, folder: Path) -> None:
    """One process under torchrun."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    path = folder / "checkpoint.pt"

    def save(state: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            torch.save(state, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)

    def load() -> Any:
        return torch.load(path, weights_only=True) if path.exists() else None

    _train(subject, folder, dist.get_rank(), dist.get_world_size(), DistributedDataParallel, load, save)


def _ray_worker(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch
    import torch

    context = ray.train.get_context()

    def save(state: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            kept = None
            if context.get_world_rank() == 0:
                torch.save(state, Path(folder) / "state.pt")
                kept = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": state["step"]}, checkpoint=kept)

    def load() -> Any:
        kept = ray.train.get_checkpoint()
        if kept is None:
            return None
        with kept.as_directory() as folder:
            return torch.load(Path(folder) / "state.pt", weights_only=True)

    _train(
        config["subject"],
        Path(config["folder"]),
        context.get_world_rank(),
        context.get_world_size(),
        ray.train.torch.prepare_model,
        load,
        save,
    )


def with_ray_train(subject: str, folder: Path, workers: int) -> None:
    """The driver; two cores whatever the number of workers."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    TorchTrainer(
        _ray_worker,
        train_loop_config={"subject": subject, "folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=False, resources_per_worker={"CPU": 2 / workers}),
        run_config=RunConfig(
            storage_path=str(folder / "ray_results"),
            failure_config=FailureConfig(max_failures=_MAX_RESTARTS),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def _torchft_worker(config: dict[str, Any]) -> None:
    """What a user of torchft writes; time-outs as short as they may be, in the peer's favour."""
    from datetime import timedelta

    import ray.train
    import torch
    from torch import nn
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
    from torchft.checkpointing.pg_transport import PGTransport

    from tests.bench.bare_loop import batches
    from tests.bench.subjects import LEARNING_RATE, SUBJECTS, digits

    torch.set_num_threads(1)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    subject, folder = SUBJECTS[config["subject"]], Path(config["folder"])
    inner = subject.build()
    raw = torch.optim.AdamW(inner.parameters(), lr=LEARNING_RATE)
    patience = timedelta(seconds=10)
    group = ProcessGroupGloo(timeout=patience)

    def load(state: dict[str, Any]) -> None:
        inner.load_state_dict(state["model"])
        raw.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=group,
        min_replica_size=1,
        load_state_dict=load,
        state_dict=lambda: {"model": inner.state_dict(), "optimizer": raw.state_dict()},
        world_size=1,
        rank=0,
        replica_id=f"replica_{rank}",
        timeout=patience,
        checkpoint_transport=PGTransport(group, timeout=patience, device=torch.device("cpu")),
    )
    model, optimizer = DistributedDataParallel(manager, inner), Optimizer(manager, raw)
    torch.manual_seed(0)
    feed = batches(*digits(), subject.batch, rank, world)
    objective = nn.CrossEntropyLoss()
    (folder / f"pid-{rank}.txt").write_text(str(os.getpid()))
    with (folder / STEPS_FILE).open("a", buffering=1) as steps:
        while True:
            inputs, targets = next(feed)
            before = manager.current_step()
            optimizer.zero_grad()
            objective(model(inputs), targets).backward()
            optimizer.step()
            if rank == 0 and manager.current_step() > before:  # committed
                steps.write(f"{manager.current_step()} {time.time():.6f}\n")


def with_torchft(subject: str, folder: Path, workers: int) -> None:
    """The driver of Ray Train with torchft; two cores whatever the number of workers."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.torch.torchft_config import TorchftConfig

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    TorchTrainer(
        _torchft_worker,
        train_loop_config={"subject": subject, "folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=False, resources_per_worker={"CPU": 1.9 / workers}),
        torch_config=TorchftConfig(
            lighthouse_kwargs={
                "min_replicas": 1,
                "join_timeout_ms": 100,
                "quorum_tick_ms": 20,
                "heartbeat_timeout_ms": 500,  # five heartbeats
            },
            backend="gloo",
        ),
        run_config=RunConfig(
            storage_path=str(folder / "ray_results"), failure_config=FailureConfig(max_failures=_MAX_RESTARTS)
        ),
    ).fit()


if __name__ == "__main__":
    if len(sys.argv) > 4:
        with_torchft(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    elif len(sys.argv) > 3:
        with_ray_train(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        with_torchrun(sys.argv[1], Path(sys.argv[2]))
