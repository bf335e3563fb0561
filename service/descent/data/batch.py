"""The types that every data set shares."""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
"""Sample numbers, [n], each from 0 to the number of samples - 1."""
Pair = tuple[Tensor, Tensor]
"""Inputs [n, ...] and targets [n, ...] of a batch, or one input and one target."""
