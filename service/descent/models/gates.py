"""Operations without a useful gradient, made trainable: straight-through and Gumbel-softmax.

A sign, a rounding or a choice has derivative zero almost everywhere, so backpropagation
gives everything before it a gradient of zero. The straight-through estimator and the
Gumbel-softmax replace that derivative. Each is here as a function and as a layer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descent.errors import ConfigError
from descent.models.arguments import flag, positive


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """A tensor with the value of `hard` and the gradient of `soft`, both of the same shape.

    Bengio, Léonard, Courville 2013:

        y = stop(hard) + (soft - stop(soft))        dy/dx = dsoft/dx

    The bracket is exactly zero, so y is equal to `hard` bit for bit; the more common
    soft + stop(hard - soft) differs from it by a rounding error. `soft` must be finite.
    """
    return hard.detach() + (soft - soft.detach())


def sign(x: Tensor) -> Tensor:
    """±1, with the gradient of the identity inside [-1, 1] and zero outside.

        y = +1 if x >= 0 else -1        dy/dx := 1 if |x| < 1 else 0

    The estimator of Bengio et al. (2013), with gradient zero where a small change of x can't
    change the sign (Hubara et al. 2016, 'Binarized Neural Networks').

    >>> x = torch.tensor([-2.0, -0.3, 0.0, 0.7], requires_grad=True)
    >>> sign(x).tolist()
    [-1.0, -1.0, 1.0, 1.0]
    >>> sign(x).sum().backward()
    >>> x.grad.tolist()
    [0.0, 1.0, 1.0, 1.0]
    """
    # torch.sign is 0 at 0, a third value; a binary unit has only two.
    hard = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    return straight_through(hard, F.hardtanh(x))


def round(x: Tensor) -> Tensor:
    """The nearest whole number (ties to even), with the gradient of the identity.

        y = round(x)        dy/dx := 1

    >>> x = torch.tensor([0.4, 1.6], requires_grad=True)
    >>> y = round(x)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.0, 2.0], [1.0, 1.0])
    """
    return straight_through(torch.round(x), x)


def gumbel_softmax(logits: Tensor, temperature: float = 1.0, *, hard: bool = False, dim: int = -1) -> Tensor:
    """A differentiable draw from the categorical distribution softmax(logits) along `dim`.

        g_i = -log(e_i),  e_i ~ Exponential(1)      (so g_i ~ Gumbel(0, 1))
        y   = softmax((logits + g) / temperature)

    argmax(logits + g) is an exact draw from the distribution, and y approaches its one-hot
    vector as the temperature approaches 0. With `hard`, y is that one-hot vector and has the
    gradient of the soft y (straight through). Jang, Gu, Poole 2017; Maddison, Mnih, Teh 2017.
    Returns the shape and dtype of `logits`; draws from torch's global generator. Raises
    ConfigError for a temperature that is not above 0.
    """
    temperature = positive("model.temperature", temperature)
    # Half precision has too few values for the noise: rare classes would never be drawn.
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    noise = -torch.empty_like(wide, memory_format=torch.contiguous_format).exponential_().log()
    soft = F.softmax((wide + noise) / temperature, dim)
    return (straight_through(_one_hot(soft, dim), soft) if hard else soft).to(logits.dtype)


class Sign(nn.Module):
    """`sign` as a layer: a tensor of any shape to one of the same shape with entries ±1."""

    def forward(self, x: Tensor) -> Tensor:
        return sign(x)


class Round(nn.Module):
    """`round` as a layer: a tensor of any shape to one of the same shape with whole entries."""

    def forward(self, x: Tensor) -> Tensor:
        return round(x)


class GumbelSoftmax(nn.Module):
    """`gumbel_softmax` over the last dimension as a layer: [..., K] logits to [..., K].

    In evaluation mode no noise is added: the output is softmax(logits / temperature), or with
    `hard` the one-hot vector of the likeliest class, so that it depends on the input alone.
    Raises ConfigError for a temperature that is not above 0 and for logits of whole numbers.
    """

    def __init__(self, temperature: float = 1.0, hard: bool = False) -> None:
        super().__init__()
        self.temperature = positive("model.temperature", temperature)
        self.hard = flag("model.hard", hard)

    def forward(self, logits: Tensor) -> Tensor:
        if not logits.is_floating_point():
            raise ConfigError(f"GumbelSoftmax takes floating-point logits, not {logits.dtype}")
        if self.training:
            return gumbel_softmax(logits, self.temperature, hard=self.hard)
        soft = F.softmax(logits / self.temperature, -1)
        return straight_through(_one_hot(soft, -1), soft) if self.hard else soft

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, hard={self.hard}"


def _one_hot(x: Tensor, dim: int) -> Tensor:
    """1 at the largest entry along `dim` (the first of several equal ones), 0 elsewhere."""
    return torch.zeros_like(x).scatter_(dim, x.argmax(dim, keepdim=True), 1.0)
