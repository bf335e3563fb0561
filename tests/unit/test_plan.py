"""What a run will do is worked out, and what it can't do refused, before any worker exists."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

from descent.config import compose
from descent.errors import DescentError
from descent.training.plan import has_bf16, pick_device, prepare, worker_range

NETS = """
import torch
from torch import nn
from torch.utils.data import Dataset

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)
    def forward(self, x):
        return self.head(x.flatten(1))

class GivesDict(Net):
    def forward(self, x): return {"logits": super().forward(x)}
class GivesNumber(Net):
    def forward(self, x): return super().forward(x).sum()
class LosesRows(Net):
    def forward(self, x): return super().forward(x)[:1]
class Detached(Net):
    def forward(self, x): return super().forward(x).detach()
class Raises(Net):
    def forward(self, x): raise KeyError("mine")
class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
class Empty(nn.Module):
    def forward(self, x): return x.flatten(1)
def number(): return 5

class OneArgument(nn.Module):
    def forward(self, x): return x.sum()
class Vector(nn.Module):
    def forward(self, x, y): return x.sum(1)
class Plain(nn.Module):
    def forward(self, x, y): return 3.0

class Digits(Dataset):
    num_outputs = 10
    def __init__(self, rows=20, side=8, breaks_at=None, top=9):
        self.rows, self.side, self.breaks_at, self.top = rows, side, breaks_at, top
    def __len__(self): return self.rows
    def __getitem__(self, i):
        if i == self.breaks_at: raise OSError("disk gone")
        return torch.ones(1, self.side, self.side), self.top if i == self.rows - 1 else i % 10
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): yield torch.ones(1, 8, 8), 0
"""


@pytest.fixture(autouse=True)
def _nets(tmp_path, monkeypatch):
    (tmp_path / "plan_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("plan_nets", None)


def planned(*overrides: str, cores: float = 2, gpus: float = 0):
    trust = ["trusted_modules=[plan_nets]"] if any("plan_nets" in o for o in overrides) else []
    return prepare(compose([*overrides, *trust]).config, cores=cores, gpus=gpus)


def refusal(*overrides: str, **resources: float) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line
        with pytest.raises(DescentError) as caught:
            planned(*overrides, **resources)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


NET = ("model=custom", "data.holdout=0.2")
LOSS = ("~loss.label_smoothing",)
DATA = ("data=custom", "data.train._target_=plan_nets.Digits")
REFUSALS = {
    ("batch.size=2",): "batch.size=2: smaller than slots=4; use slots=2 or a larger batch",
    (
        "batch.size=2",
        "slots=workers",
        "workers=4",
    ): "batch.size=2: smaller than slots=4 (one for each of 4 workers); use workers=2",
    ("slots=1", "workers=2"): "workers=2: more than slots=1, so a worker would have nothing to do; use slots=2",
    ("workers=8",): "workers=8: more than slots=4, so a worker would have nothing to do; use slots=8",
    ("workers={min:1,max:6}",): "workers=6: more than slots=4",
    ("batch.size=2000",): "batch.size=2000: the training set has 1617 samples; use batch=full",
    ("model=resnet", "data=breast_cancer"): "model.input_shape=[30]: a ResNet takes images",
    ("model=gpt", "data=digits"): "model.input_shape=[1,8,8]: a GPT takes sequences",
    (
        "model.num_outputs=5",
    ): "data.train: sample 3 has label 5, but the model has 5 outputs (0 to 4); set model.num_outputs=6",
    ("model.num_outputs=9",): "has label 9, but the model has 9 outputs (0 to 8); set model.num_outputs=10",
    ("device=cuda",): "device=cuda: the cluster has no GPU",
    ("resources.gpus=1",): "resources.gpus=1: the cluster has no GPU to give",
    ("data=csv",): "data.path is not set: give data.path=FILE.csv",
    (
        "data=csv",
        "data.path=bad.csv",
        "data.target=y",
    ): "bad.csv, row 3, column 'b': value 'oops' is not a finite number",
    ("data=arrays", "data.path=none.npz"): "none.npz doesn't exist",
    (*NET, "model._target_=plan_nets.GivesDict"): "forward gives a dict, Descent needs one tensor",
    (
        *NET,
        "model._target_=plan_nets.GivesNumber",
    ): "forward gives shape [] for 2 samples, Descent needs one row a sample",
    (*NET, "model._target_=plan_nets.LosesRows"): "forward gives shape [1, 10] for 2 samples",
    (*NET, "model._target_=plan_nets.Detached"): "no gradient reaches its parameters",
    (
        *NET,
        "model._target_=plan_nets.Raises",
    ): "inputs of shape [1, 8, 8], torch.float32: KeyError: 'mine' (plan_nets.py, line 22)",
    (*NET, "model._target_=plan_nets.Frozen"): "has no parameters to train",
    (*NET, "model._target_=plan_nets.Empty"): "has no parameters to train",
    (*NET, "model._target_=plan_nets.number"): "gives a int, not a torch.nn.Module",
    (
        *LOSS,
        "loss._target_=plan_nets.OneArgument",
    ): "loss._target_=plan_nets.OneArgument: can't compare outputs [2, 10]",
    (*LOSS, "loss._target_=plan_nets.Vector"): "gives shape [2], Descent needs one number a batch",
    (
        *LOSS,
        "loss._target_=plan_nets.Plain",
    ): "loss._target_=plan_nets.Plain: gives float, Descent needs one number a batch",
    ("loss=mse",): "it needs one target for each output; classes go with loss=cross_entropy",
    # a single sample would broadcast, [1, 10] against [1], and train on nonsense
    ("loss=mse", "batch=stochastic"): "it needs one target for each output",
    ("optimizer._target_=torch.nn.Linear",): "is a class of kind 'module'; optimizer needs 'optimizer'",
    ("optimizer.lr=-1",): "optimizer.lr=-1: AdamW refuses it",
    ("+optimizer.lrr=1",): "optimizer.lrr: AdamW has no such option; did you mean lr?",
    ("+model.wdith=5",): "model.wdith: MLP has no such argument; did you mean model.width?",
    (
        "schedule=constant",
        "~schedule.warmup_steps",
        "schedule._target_=torch.optim.lr_scheduler.StepLR",
    ): "is not a public class of torch.nn, torch.optim, torch.utils.data or Descent",
    ("schedule.warmup_steps=100000",): "schedule.warmup_steps=100000: must be below the run's 758 steps",
    (
        "schedule=plateau",
        "data=custom",
        "data.train._target_=plan_nets.Digits",
        "data.holdout=0",
        "batch.size=4",
    ): "schedule=plateau: goes by the evaluation loss, and there is nothing to evaluate on",
    (*DATA, "+data.train.breaks_at=0"): "OSError: disk gone",
    (
        *DATA,
        "+data.train.top=12",
        "batch.size=4",
        "data.holdout=0",
    ): "sample 19 has label 12, but the model has 10 outputs (0 to 9); set model.num_outputs=13 or mend the data",
    (
        *DATA,
        "+data.train.top=-7",
        "batch.size=4",
        "data.holdout=0",
    ): "sample 19 has label -7, but the model has 10 outputs (0 to 9); mend the data",
    ("data=custom", "data.train._target_=plan_nets.Stream"): "data.train: Stream is a stream (IterableDataset)",
    (
        *DATA,
        "batch.size=4",
        "data.evaluate={_target_:plan_nets.Digits,side:4}",
    ): "data.evaluate: model.input_shape=[1,8,8]: the network got inputs of shape [1,4,4]",
    ("data.train._target_=torch.nn.ReLU",): "is a class of kind 'module'; data needs 'data set'",
}


@pytest.mark.parametrize("overrides", REFUSALS, ids=" ".join)
def test_what_cannot_train_is_refused_in_one_line(overrides):
    Path("bad.csv").write_text("a,b,y\n1,2,x\n3,oops,z\n4,5,x\n")
    assert REFUSALS[overrides] in refusal(*overrides)


def test_bf16_is_refused_exactly_where_the_device_lacks_it():
    """Both kinds of machine are held to it: `has_bf16` against what the kernel lists of the CPU."""
    listed = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if re.search(r"^flags\s*:.*\bavx512_bf16\b", listed, re.M):
        assert has_bf16("cpu")
    elif re.search(r"^flags\s*:", listed, re.M) and "avx512bw" not in listed:
        assert not has_bf16("cpu")
    if has_bf16("cpu"):
        assert planned("precision=bf16", "workers=1").plan.device == "cpu"
    else:
        assert refusal("precision=bf16") == (
            "precision=bf16: the cpu here has no bfloat16 arithmetic; use precision=fp32"
        )


def test_the_device_is_what_the_cluster_has():
    for device, gpus, picked in (("auto", 0, "cpu"), ("auto", 1, "cuda"), ("cpu", 1, "cpu"), ("cuda", 2, "cuda")):
        assert pick_device(compose([f"device={device}"]).config, gpus) == picked
    assert pick_device(compose(["resources.gpus=0"]).config, 4) == "cpu"
    for overrides, why in {
        ("device=cuda", "resources.gpus=0"): "with device=cuda each worker needs one",
        ("device=cpu", "resources.gpus=0.5"): "resources.gpus=0.5: device=cpu takes none",
    }.items():
        with pytest.raises(DescentError, match=why):
            pick_device(compose(list(overrides)).config, 4)


@pytest.mark.parametrize(
    ("asked", "workers", "backend"),
    [("auto", 2, "nccl"), ("1", 2, "nccl"), ("0.75", 2, "nccl"), ("0.5", 4, "gloo"), ("0.1", 20, "gloo")],
)
def test_workers_that_share_a_gpu_talk_over_gloo(asked: str, workers: int, backend: str) -> None:
    plan = planned("device=cuda", f"resources.gpus={asked}", "slots=20", gpus=2).plan
    assert (plan.max_workers, plan.backend) == (workers, backend)
    assert planned("device=cpu", gpus=2).plan.backend == "gloo"


def test_workers_are_one_per_gpu_or_core_up_to_the_slots():
    auto = compose(["resources.cpus=2"]).config
    assert worker_range(auto, cores=7, gpus=0, device="cpu") == (1, 3)
    assert worker_range(auto, cores=64, gpus=0, device="cpu") == (1, 4)
    assert worker_range(auto, cores=1, gpus=0, device="cpu") == (1, 1)
    assert worker_range(auto, cores=64, gpus=8, device="cuda") == (1, 4)
    assert worker_range(compose(["slots=8"]).config, cores=64, gpus=8, device="cuda") == (1, 8)
    followed = compose(["slots=workers"]).config
    assert worker_range(followed, cores=64, gpus=8, device="cuda") == (1, 8)
    assert worker_range(followed, cores=64, gpus=0, device="cpu") == (1, 4)
    given = compose(["workers={min:2,max:5}"]).config
    assert worker_range(given, cores=1, gpus=0, device="cpu") == (2, 5)


def test_the_numbers_of_a_run_follow_from_config_and_data():
    plan = planned("batch.size=100", "epochs=2.5", "workers=3", "slots=3", "batch.micro_size=20").plan
    assert (plan.num_samples, plan.num_evaluation) == (1617, 180)
    assert plan.total_steps == 41  # 2.5 passes of 1,617 samples are 40.4 steps of 100
    assert plan.steps_per_epoch == 17 and plan.slots == 3 and plan.micro_size == 20
    assert planned("batch=full", "epochs=3", "slots=2").plan.micro_size == 809
    assert plan == type(plan).from_dict(plan.to_dict())


def test_looking_at_the_model_leaves_it_as_the_seed_made_it():
    """The preflight's forward must not move batch norm's averages or leave gradients."""
    prepared = planned("model=resnet", "workers=2")
    assert prepared.plan.changing_buffers and not prepared.plan.uses_non_torch_rng
    again = planned("model=resnet", "workers=2").model.state_dict()
    for name, tensor in prepared.model.state_dict().items():
        assert torch.equal(tensor, again[name])
        assert "running_mean" not in name or not tensor.any()
    assert all(p.grad is None for p in prepared.model.parameters())


def test_the_slots_and_so_the_mathematics_do_not_follow_the_number_of_workers():
    assert {planned(f"workers={n}").plan.slots for n in (1, 2, 4)} == {4}
    assert {planned(f"workers={n}", "slots=workers").plan.slots for n in (1, 2, 4)} == {1, 2, 4}
    assert planned("batch=stochastic").plan.slots == 1
