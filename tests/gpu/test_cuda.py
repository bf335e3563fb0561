"""A run on a GPU: what it computes, its bits, its checkpoints (make test-gpu)."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from descent.config import compose
from descent.messages import Membership, StepRecord
from descent.training.collectives import Group
from descent.training.plan import prepare
from descent.training.reduction.compressed import Compressed
from descent.training.results import MicroBatchLoss
from descent.training.sentinel import hash_on_device
from descent.training.slot_balancer import assign_slots
from descent.training.stopwatch import Stopwatch
from descent.training.trainer import Control, Trainer
from tests.distributed.replicas import Case, crew
from tests.distributed.test_resume import resumed, saved


def losses(folder: Path, device: str, *overrides: str) -> list[float]:
    """The loss of every step of a run with one replica."""
    composed = compose(
        [
            "steps=20",
            "epochs=null",
            "workers=1",
            f"device={device}",
            "checkpoint.every=null",
            *overrides,
        ]
    )
    plan = prepare(composed.config, cores=1.0, gpus=float(torch.cuda.device_count())).plan
    control = Control()
    trainer = Trainer(composed.config, plan, folder, torch.device(device), control)
    trainer.run(Membership(1, 0, 1, "127.0.0.1", 0, assign_slots(plan.slots, 1), plan.micro_size))
    trainer.finish_saving()
    return [r.metrics["train/loss"] for r in control.records if "train/loss" in r.metrics]


@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_the_gpu_computes_what_the_cpu_computes(tmp_path: Path, model: str) -> None:
    on_cpu = losses(tmp_path / "cpu", "cpu", f"model={model}")
    on_gpu = losses(tmp_path / "cuda", "cuda", f"model={model}")
    assert on_gpu == pytest.approx(on_cpu, rel=2e-2)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["precision=bf16"], marks=pytest.mark.real_gpu),
        pytest.param(["precision=bf16", "compile=true"], marks=pytest.mark.real_gpu),
        ["optimizer=muon"],
        ["optimizer=nadam"],
    ],
)
def test_each_way_of_computing_learns(tmp_path: Path, options: list[str]) -> None:
    found = losses(
        tmp_path,
        "cuda",
        "model=gpt_tiny",
        "data=stdlib",
        "data.max_bytes=50000",
        "batch.size=16",
        *options,
    )
    assert found[-1] < 0.8 * found[0]


def test_the_same_run_gives_the_same_losses_on_the_gpu(tmp_path: Path) -> None:
    first = losses(tmp_path / "a", "cuda", "model.dropout=0.2", "reduction=exact", "slots=2")
    second = losses(tmp_path / "b", "cuda", "model.dropout=0.2", "reduction=exact", "slots=2")
    assert first == second


@pytest.mark.parametrize(("before", "after"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_from_its_checkpoint_on_the_other_device(tmp_path: Path, before: str, after: str) -> None:
    run = ["model.norm=batch", "steps=20", "epochs=null", "checkpoint.every=5"]
    cases = [Case.of(run, tmp_path / str(i), 1, device) for i, device in enumerate((before, after))]
    with crew(1) as pool:
        (whole,), (target,) = saved(pool, cases[0], 1, 10)
        run = resumed(pool, cases[1], target, 1)
        last = run.finish()
    assert last.step == whole.step == 20
    losses = [r.metrics["train/loss"] for r in run.kept.records if isinstance(r, StepRecord)]
    assert losses == pytest.approx(whole.losses[10:], rel=2e-2)


def test_a_state_has_the_same_hash_wherever_it_lies() -> None:
    state = [torch.randn(3, 1500), torch.randn(7).bfloat16(), torch.tensor(3.0)]
    on_gpu = [t.cuda() for t in state]
    before = int(hash_on_device(on_gpu))  # type: ignore[arg-type]
    assert before == int(hash_on_device(state))  # type: ignore[arg-type]
    on_gpu[0].view(torch.int32)[1, 7] ^= 1
    assert before != int(hash_on_device(on_gpu))  # type: ignore[arg-type]


def test_powersgd_on_the_gpu_is_that_of_the_cpu() -> None:
    batch, found = torch.randn(6, 50).double(), []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Linear(50, 40).double().to(device)
        group = Group(0, 1, torch.device(device), threading.Event())
        reducer = Compressed(
            model, lambda b, n, m=model: MicroBatchLoss(m(b).square().sum(), len(n)), group, "powersgd"
        )
        for _ in range(3):
            reducer.begin_step()
            loss = reducer.forward(batch.to(device), range(len(batch)), last=True)
            reducer.backward(loss.total, torch.tensor(1.0, device=device), last=True)
            reducer.finish_step()
        found.append(model.weight.grad.cpu())
    torch.testing.assert_close(*found)


@pytest.mark.real_gpu
def test_the_stopwatch_measures_the_device_and_not_the_host() -> None:
    a, watch = torch.randn(8192, 8192, device="cuda"), Stopwatch(torch.device("cuda"), True)
    for _ in range(2):
        a @ a
    measured = []
    for products in (1, 20):
        watch.begin_step()
        for _ in range(products):
            a @ a
        watch.stop(1)
        torch.cuda.synchronize()
        measured.append(watch.begin_step())
    assert 0.0 < 5 * measured[0] < measured[1]
