"""Handwritten digits, 8×8 pixels, that come with scikit-learn (UCI, 1998)."""

import torch
from sklearn.datasets import load_digits

from service.data.base import TensorData, rows_of


class Digits(TensorData):
    """1,797 digits: inputs float32 [n, 1, 8, 8] scaled from 0…16 to [0, 1], targets int64 [n]."""

    def __init__(self, split: str = "all", holdout: float = 0.1, seed: int = 0) -> None:
        pixels, labels = load_digits(return_X_y=True)
        rows = rows_of(len(pixels), split, holdout, seed)
        super().__init__(
            torch.from_numpy(pixels[rows] / 16.0).float().view(-1, 1, 8, 8),
            torch.from_numpy(labels[rows]).long(),
            num_outputs=10,
            name="digits",
            source="scikit-learn load_digits",
        )
