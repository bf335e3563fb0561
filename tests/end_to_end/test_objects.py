"""`descent.train` with objects as they are: what a script's main module defines travels to the workers by value."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json

import torch
from torch import nn

import descent
from descent.training.input.sampling import SampleOrder

SCALE = 2.0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return SCALE * self.linear(x)


def main():
    torch.manual_seed(1)
    x = torch.randn(96, 3)
    y = (x.sum(1) > 0).long()
    smoothing = 0.1  # in the closure of the loss

    def loss(model, batch):
        inputs, targets = batch
        return nn.functional.cross_entropy(model(inputs), targets, label_smoothing=smoothing)

    net = Net()
    first = net.linear.weight.detach().clone()
    common = {"optimizer.lr": 0.1, "data.holdout": 0}
    objects = {"model": net, "data": (x, y), "task": loss}
    result = descent.train(
        ["optimizer=sgd", "schedule=constant"], **objects, steps=6, epochs=None, workers=2, batch={"size": 12}, **common
    )
    refused = []
    for call in (
        lambda: descent.load(result),
        lambda: descent.train({"resume": result.name, "steps": 9}),
        lambda: descent.train(model=net, data=torch.utils.data.DataLoader([1])),
    ):
        try:
            call()
        except descent.DescentError as error:
            refused.append(str(error))
    untouched = torch.equal(net.linear.weight, first)
    again = descent.train({"resume": result.name, "steps": 9}, **objects)
    trained = descent.load(again, model=net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    order = SampleOrder(96, 12, 0)
    for step in range(1, 10):
        at = torch.from_numpy(order.samples_of(step))
        optimizer.zero_grad()
        loss(net, (x[at], y[at])).backward()
        optimizer.step()
    print(json.dumps({
        "states": [result.state, again.state, again.step],
        "refused": refused,
        "untouched": untouched,
        "difference": float((trained.linear.weight - net.linear.weight).abs().max()),
        "moved": float((net.linear.weight - first).abs().max()),
        "pickled": [str(f) for f in again.run_dir.rglob("*.pkl")],
    }))


if __name__ == "__main__":
    main()
"""


def test_a_model_data_and_a_loss_go_in_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["states"] == ["FINISHED", "FINISHED", 9]
    of_load, of_resume, of_loader = found["refused"]
    assert "model came from Python as objects" in of_load and "descent.load(" in of_load
    assert "model and data and task came from Python" in of_resume and "model=…, data=…, task=…" in of_resume
    assert of_loader.startswith("data: is a DataLoader") and "loader.dataset" in of_loader
    assert found["untouched"] and found["pickled"] == []
    assert found["difference"] < 1e-6 < found["moved"]


def test_a_placeholder_that_is_typed_stands_for_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("descent")),
            "train",
            "model=custom",
            "model._target_=descent.given.model.Net",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "came from Python as objects" in done.stderr and "Traceback" not in done.stderr
