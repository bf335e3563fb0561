"""Several labels a sample, with F1 and AUC of the whole set."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.programs.pictures import Pictures
from tests.programs.program import Program, built, plain_loop


class Labels(Dataset[tuple[Tensor, Tensor]]):
    """Whether a digit is even, large, and one of 3, 6 and 9."""

    def __init__(self) -> None:
        self.pictures = Pictures()

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, digit = self.pictures[index]
        return image, torch.stack([digit % 2 == 0, digit > 4, (digit > 0) & (digit % 3 == 0)]).float()


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))


PROGRAM = Program(
    [
        "model=custom",
        "model._target_=tests.programs.multi_label.Net",
        "data=custom",
        "data.train._target_=tests.programs.multi_label.Labels",
        "loss=bce_with_logits",
    ],
    lambda: plain_loop(
        built(Net), Labels(), lambda m, b: nn.functional.binary_cross_entropy_with_logits(m(b[0]), b[1])
    ),
)
MEASURED = [
    *PROGRAM.overrides,
    "data.holdout=0.25",
    "evaluate.every=3",
    "evaluate.batch_size=7",
    "metrics.f1._target_=torchmetrics.classification.MultilabelF1Score",
    "metrics.f1.num_labels=3",
    "metrics.auc._target_=torchmetrics.classification.MultilabelAUROC",
    "metrics.auc.num_labels=3",
    "checkpoint.keep_best=eval/f1",
]
