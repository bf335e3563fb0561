"""Breast cancer, Wisconsin diagnostic: the tabular data set that comes with scikit-learn."""

import torch

from descent.data.base import TensorData
from descent.data.preprocessing import standardization_of
from descent.data.scikit_learn import read_table
from descent.data.splits import rows_of


class BreastCancer(TensorData):
    """569 tumours: inputs float32 [n, 30], targets int64 [n] (0 malignant, 1 benign).

    Each measurement is standardized by the mean and standard deviation of the *training* split that
    (holdout, seed) defines, whichever split is asked for, so that nothing of the evaluation samples
    leaks into training. `holdout` and `seed` must be the same for both splits.
    """

    def __init__(self, split: str = "all", holdout: float = 0.1, seed: int = 0) -> None:
        table = read_table("breast_cancer.csv", skip_header=True)
        measured, diagnosis = table[:, :-1], table[:, -1]
        train = rows_of(len(measured), "train", holdout, seed)
        standardize = standardization_of(measured, train)
        rows = rows_of(len(measured), split, holdout, seed)
        super().__init__(
            standardize(torch.from_numpy(measured[rows])),
            torch.from_numpy(diagnosis[rows]).long(),
            num_outputs=2,
            name="breast_cancer",
            source="scikit-learn load_breast_cancer",
            class_names=("malignant", "benign"),
            preprocessing=standardize,
        )
