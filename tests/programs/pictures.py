"""96 pictures of handwritten digits, 8 by 8 pixels from 0 to 1, as a map-style data set of pairs."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self) -> None:
        digits = load_digits()
        self.images = torch.tensor(digits.images[:96] / 16, dtype=torch.float32)[:, None]
        self.labels = torch.tensor(digits.target[:96])  # also where data.sampler=class_balanced looks

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]
