"""Breast cancer, Wisconsin diagnostic: the tabular data set that comes with scikit-learn."""

import torch

from descent.data.scikit_learn import read_table
from descent.data.splits import rows_of
from descent.data.table_columns import Columns, TableData


class BreastCancer(TableData):
    """569 tumours: inputs float32 [n, 30], targets int64 [n] (0 malignant, 1 benign).

    Each measurement is standardized by the mean and standard deviation of the *training* split that
    (holdout, seed) defines, whichever split is asked for, so that nothing of the evaluation samples
    leaks into training. `holdout` and `seed` must be the same for both splits.
    """

    def __init__(self, split: str = "all", holdout: float = 0.1, seed: int = 0) -> None:
        table = read_table("breast_cancer.csv", skip_header=True)
        measured, diagnosis = table[:, :-1], table[:, -1]
        train = rows_of(len(measured), "train", holdout, seed)
        names = tuple(f"measurement_{i}" for i in range(measured.shape[1]))
        columns = Columns(names, measured, {}, frozenset(names), "breast_cancer.csv")
        rows = rows_of(len(measured), split, holdout, seed)
        super().__init__(
            columns.of(rows),
            torch.from_numpy(diagnosis[rows]).long(),
            columns.learn(train),
            num_outputs=2,
            name="breast_cancer",
            source="scikit-learn load_breast_cancer",
            class_names=("malignant", "benign"),
        )
