"""Columns of numbers brought to mean 0 and standard deviation 1."""

import numpy as np
import numpy.typing as npt

from descent.data.batch import Indices

Floats = npt.NDArray[np.float64]


def standardized(values: Floats, train: Indices) -> tuple[Floats, Floats, Floats]:
    """([n, columns] standardized, mean [columns], std [columns]), by the statistics of the rows `train`.

    `std` is the population's standard deviation; a column that is constant in training is only centred.
    """
    mean = values[train].mean(axis=0)
    std = values[train].std(axis=0)
    # Rounding leaves a constant column a spread of about 1e-16 of its size, which is no spread to divide by.
    std = np.where(std > 1e-12 * np.abs(mean), std, 1.0)
    return (values - mean) / std, mean, std
