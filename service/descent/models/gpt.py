"""A decoder-only transformer: it predicts the next token (or byte) at each position."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descent.errors import ConfigError
from descent.models.arguments import count, flag, input_sizes, outputs, probability, shown


class GPT(nn.Module):
    """[B, T] int64 token ids to [B, T, num_outputs] logits; a position sees itself and those before it.

    GPT-2 (Radford et al. 2019): learned positions, norms before attention and before the
    feed-forward part (Xiong et al. 2020 show why this trains well), GELU, N(0, 0.02) weights.
    The weights of the two projections that add to the residual stream are smaller by
    sqrt(2 · layers), so that the variance of the stream doesn't grow with depth. 12 layers, 12 heads, width 768, a
    context of 1024 and GPT-2's vocabulary of 50,257 give its 124,439,808 parameters.

    input_shape: (T,), the longest context; inputs may be shorter
    num_outputs: the size of the vocabulary, for inputs and outputs
    tied: the output layer is the token embedding's transpose (Press, Wolf 2017)
    bias: whether linear layers and norms have a bias

    Raises ConfigError for arguments out of range, and in forward for inputs that are not whole
    numbers of shape [B, 1 to T].
    """

    classes_last = True
    """Tells the loss that the outputs are one row of logits for each token, also where T equals num_outputs."""

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
        tied: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        shape = input_sizes(input_shape, "[256]")
        if len(shape) != 1:
            raise ConfigError(f"model.input_shape={shown(shape)}: a GPT takes sequences of token ids, [length]")
        (self.context,) = shape
        num_outputs = outputs(num_outputs)
        layers, heads = count("model.layers", layers), count("model.heads", heads)
        width = count("model.width", width)
        if width % heads:
            fitting = [h for h in range(1, width + 1) if width % h == 0]
            nearest = min(fitting, key=lambda h: abs(h - heads))
            raise ConfigError(f"model.heads={heads}: doesn't divide model.width={width}; {nearest} would")
        dropout, bias = probability("model.dropout", dropout), flag("model.bias", bias)

        self.tokens = nn.Embedding(num_outputs, width)
        self.positions = nn.Embedding(self.context, width)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads, dropout, bias) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=bias)
        # With tied weights there is no second module for the same tensor: one weight has one name.
        self.head = None if flag("model.tied", tied) else nn.Linear(width, num_outputs, bias=False)
        self._initialize(layers)

    def _initialize(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                into_stream = name.endswith((".out.weight", ".down.weight"))
                std = 0.02 / math.sqrt(2 * layers) if into_stream else 0.02
                nn.init.normal_(parameter, 0.0, std)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.dim() != 2 or ids.shape[1] > self.context or ids.dtype not in (torch.int64, torch.int32):
            raise ConfigError(
                f"model.input_shape=[{self.context}]: the network got inputs of shape "
                f"{shown(tuple(ids.shape[1:]))}, {ids.dtype}; it needs int64 token ids, "
                f"at most {self.context} a sample"
            )
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return F.linear(x, self.tokens.weight) if self.head is None else self.head(x)


class Block(nn.Module):
    """[B, T, width] to the same shape: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, bias=bias)
        self.attention = Attention(width, heads, dropout, bias)
        self.norm2 = nn.LayerNorm(width, bias=bias)
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        # GPT-2 uses the tanh form of GELU, which is also the cheaper one.
        y = F.gelu(self.up(self.norm2(x)), approximate="tanh")
        return x + self.dropout(self.down(y))


class Attention(nn.Module):
    """[B, T, width] to the same shape: softmax(q kᵀ / sqrt(d) + causal mask) v per head (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # [B, T, 3 * width] to three of [B, heads, T, width / heads]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))
