"""Handwritten digits, 8×8 pixels, that come with scikit-learn (UCI, 1998)."""

import torch

from descent.data.base import TensorData
from descent.data.scikit_learn import read_table
from descent.data.splits import rows_of


class Digits(TensorData):
    """1,797 digits: inputs float32 [n, 1, 8, 8], scaled from 0…16 to [0, 1]; targets int64 [n]."""

    def __init__(self, split: str = "all", holdout: float = 0.1, seed: int = 0) -> None:
        table = read_table("digits.csv.gz", skip_header=False)
        pixels, labels = table[:, :-1], table[:, -1]
        rows = rows_of(len(pixels), split, holdout, seed)
        super().__init__(
            torch.from_numpy(pixels[rows] / 16.0).float().view(-1, 1, 8, 8),
            torch.from_numpy(labels[rows]).long(),
            num_outputs=10,
            name="digits",
            source="scikit-learn load_digits",
            class_names=[str(digit) for digit in range(10)],
        )
