"""What a data set does to the numbers of its source before a model gets them, as modules that travel with the model."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from descent.data.batch import Indices

Floats = npt.NDArray[np.float64]


class Preprocessing(nn.Module):
    """Raw inputs [n, *input_shape], as the source has them, to inputs of the same shape, as the model takes them."""

    def undo(self, inputs: Tensor) -> Tensor:
        """Raw inputs, in the source's type, that become `inputs` (up to rounding)."""
        raise NotImplementedError


class Standardize(Preprocessing):
    """Float64 columns to float32 columns of mean 0 and standard deviation 1: (raw - mean) / std.

    mean, std: [columns]. In float64, because a column of large numbers that differ little would lose
    its differences in float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Floats, std: Floats) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(np.array(mean)))
        self.register_buffer("std", torch.from_numpy(np.array(std)))

    def forward(self, raw: Tensor) -> Tensor:
        return ((raw.double() - self.mean) / self.std).float()

    def undo(self, inputs: Tensor) -> Tensor:
        return inputs.double() * self.std + self.mean


class NormalizePixels(Preprocessing):
    """Bytes [n, channels, rows, columns] to float32: (raw / 255 - mean) / std.

    mean, std: numbers, or one for each channel, [channels, 1, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Tensor, std: float | Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32))

    def forward(self, raw: Tensor) -> Tensor:
        return (raw.float() / 255.0 - self.mean) / self.std

    def undo(self, inputs: Tensor) -> Tensor:
        return ((inputs * self.std + self.mean) * 255.0).round().clamp(0, 255).to(torch.uint8)


class Scale(Preprocessing):
    """Numbers of any type to float32: raw * scale. dtype: the type of the raw numbers."""

    def __init__(self, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale, self.dtype = scale, dtype

    def forward(self, raw: Tensor) -> Tensor:
        return raw.float() * self.scale

    def undo(self, inputs: Tensor) -> Tensor:
        raw = inputs.double() / self.scale
        return raw.to(self.dtype) if self.dtype.is_floating_point else raw.round().to(self.dtype)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, dtype={self.dtype}"


def standardization_of(values: Floats, train: Indices) -> Standardize:
    """The standardization of [n, columns] by the statistics of the rows `train`.

    The deviation is the population's; a column that is constant in training is only centred.
    """
    mean = values[train].mean(axis=0)
    std = values[train].std(axis=0)
    # Rounding leaves a constant column a spread of about 1e-16 of its size, which is no spread to divide by.
    return Standardize(mean, np.where(std > 1e-12 * np.abs(mean), std, 1.0))
