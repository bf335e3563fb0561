"""The convolution net of PyTorch's MNIST example: log-probabilities, NLL loss, a learning rate that falls by steps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.programs.pictures import Pictures
from tests.programs.program import Program, batches, built, draw_as_in


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv2(self.conv1(x).relu()).relu(), 2).flatten(1)
        return F.log_softmax(self.fc2(self.fc1(x).relu()), dim=1)


def by_hand() -> list[float]:
    model = built(Net)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.7)
    losses = []
    for step, (images, labels) in enumerate(batches(Pictures()), start=1):
        draw_as_in(step)
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.digits_classifier.Net",
        "data=custom",
        "data.train._target_=tests.programs.pictures.Pictures",
        "~loss.label_smoothing",
        "loss._target_=torch.nn.NLLLoss",
        "optimizer=adadelta",
        "optimizer.lr=1.0",
        "schedule=step",
        "schedule.step_size=2",
        "schedule.gamma=0.7",
    ],
    by_hand,
)
