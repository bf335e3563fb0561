"""Initial weights. Their scale decides whether gradients vanish in a deep network."""

import math

from torch import nn

DEFAULT_STD = 0.01

SCHEMES = (
    "default",
    "xavier_uniform",
    "xavier_normal",
    "kaiming_uniform",
    "kaiming_normal",
    "orthogonal",
    "normal",
)

_NAMES_IN_TORCH = {"identity": "linear", "binary": "linear"}

# torch has no gain for these three. The gain is 1 / sqrt(E[f(z)^2]) for z ~ N(0, 1), which keeps
# the second moment equal from layer to layer; He et al. derive sqrt(2) for ReLU in this way.
_OWN_GAINS = {"gelu": 1.5335304, "silu": 1.6765325, "elu": 1.2451983}


def gain(activation: str) -> float:
    """The factor for the weights that compensates for the loss of variance in `activation`.

    It is torch's own where `torch.nn.init.calculate_gain` knows the activation.

    >>> round(gain("relu") ** 2, 6)
    2.0
    """
    if activation in _OWN_GAINS:
        return _OWN_GAINS[activation]
    name = _NAMES_IN_TORCH.get(activation, activation)
    return float(nn.init.calculate_gain(name))  # type: ignore[arg-type]


def initialize(linear: nn.Linear, scheme: str, activation: str, std: float = DEFAULT_STD) -> None:
    """Draw the weights of `linear` in place from torch's global generator and set its bias to zero.

    With g the gain of the activation that follows, n inputs and m outputs:

    - default: nothing is changed; torch has drawn weights and bias from U(±1/sqrt(n))
    - xavier: variance 2 g² / (n + m) (Glorot, Bengio 2010)
    - kaiming: variance g² / n (He et al. 2015)
    - orthogonal: g times a (semi-)orthogonal matrix (Saxe et al. 2014)
    - normal: standard deviation `std`, whatever the shape
    """
    assert scheme in SCHEMES, scheme
    if scheme == "default":
        return
    weight, g = linear.weight, gain(activation)
    kaiming_std = g / math.sqrt(linear.in_features)
    if scheme == "xavier_uniform":
        nn.init.xavier_uniform_(weight, g)
    elif scheme == "xavier_normal":
        nn.init.xavier_normal_(weight, g)
    elif scheme == "kaiming_uniform":
        nn.init.uniform_(weight, -math.sqrt(3) * kaiming_std, math.sqrt(3) * kaiming_std)
    elif scheme == "kaiming_normal":
        nn.init.normal_(weight, 0.0, kaiming_std)
    elif scheme == "orthogonal":
        nn.init.orthogonal_(weight, g)
    else:
        nn.init.normal_(weight, 0.0, std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
