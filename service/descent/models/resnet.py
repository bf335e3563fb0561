"""A residual network for small images, from 1×8×8 digits to 3×64×64 photographs."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from descent.errors import ConfigError
from descent.models.arguments import choice, count, flag, input_sizes, outputs, shown, sizes
from descent.models.mlp import refuse_single_sample

NORMS = ("batch", "group")


class ResNet(nn.Module):
    """[B, *input_shape] floating point to [B, num_outputs]; input_shape is (C, H, W) or (H, W).

    The CIFAR form of He et al. 2015 ('Deep Residual Learning for Image Recognition',
    section 4.2): a 3×3 convolution without pooling, then one stage of basic blocks (two 3×3
    convolutions each) per entry of `widths`, then the mean over all positions and a linear
    layer. Each stage but the first halves height and width. Where a block changes
    the shape, its skip is a strided 1×1 convolution. `blocks` is one number for all
    stages or a list of one per stage: blocks=3, widths=(16, 32, 64) is the paper's
    ResNet-20, blocks=[2, 2, 2, 2], widths=(64, 128, 256, 512) is ResNet-18's body.

    norm: batch, or group (Wu, He 2018; with `groups` groups, independent of the batch)
    zero_init_residual: the scale of each block's last norm starts at zero, so that the block
      starts as its skip connection alone (Goyal et al. 2017)

    Raises ConfigError for arguments out of range, and in forward for inputs of another
    shape and for whole numbers.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_outputs: int,
        blocks: int | Sequence[int] = 3,
        widths: Sequence[int] = (16, 32, 64),
        norm: str = "batch",
        groups: int = 8,
        zero_init_residual: bool = True,
    ) -> None:
        super().__init__()
        self.input_shape = input_sizes(input_shape, "[3,32,32]")
        if len(self.input_shape) not in (2, 3):
            raise ConfigError(
                f"model.input_shape={shown(self.input_shape)}: a ResNet takes images, "
                "[channels,height,width] or [height,width]; for anything else there is model=mlp"
            )
        num_outputs = outputs(num_outputs)
        widths = sizes("model.widths", widths)
        per_stage = _blocks_per_stage(blocks, len(widths))
        choice("model.norm", norm, NORMS)
        flag("model.zero_init_residual", zero_init_residual)
        self.groups = _groups(groups, widths) if norm == "group" else None
        channels = self.input_shape[0] if len(self.input_shape) == 3 else 1

        self.stem = _convolution(channels, widths[0], 3)
        self.stem_norm = _norm(widths[0], self.groups)
        self.stages = nn.ModuleList()
        before = widths[0]
        for stage, (width, num) in enumerate(zip(widths, per_stage, strict=True)):
            layers = []
            for index in range(num):
                stride = 2 if stage > 0 and index == 0 else 1
                layers.append(BasicBlock(before, width, stride, self.groups, zero_init_residual))
                before = width
            self.stages.append(nn.Sequential(*layers))
        self.head = nn.Linear(before, num_outputs)
        # Height and width after all stages; each halving rounds up.
        halved = [-(-side // 2 ** (len(widths) - 1)) for side in self.input_shape[-2:]]
        self.ends_in_one_pixel = halved == [1, 1]

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.input_shape or not x.is_floating_point():
            raise ConfigError(
                f"model.input_shape={shown(self.input_shape)}: the network got inputs of shape "
                f"{shown(tuple(x.shape[1:]))}, {x.dtype}; it needs that shape in floating point"
            )
        if len(self.input_shape) == 2:
            x = x.unsqueeze(1)
        if self.groups is None and self.ends_in_one_pixel and self.training:
            refuse_single_sample(x, "model.norm=group")
        x = F.relu(self.stem_norm(self.stem(x)))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


class BasicBlock(nn.Module):
    """[B, inputs, H, W] to [B, width, ceil(H / stride), ceil(W / stride)]: relu(skip(x) + f(x))."""

    def __init__(self, inputs: int, width: int, stride: int, groups: int | None, zero_init_residual: bool) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width, 3, stride)
        self.norm1 = _norm(width, groups)
        self.conv2 = _convolution(width, width, 3)
        self.norm2 = _norm(width, groups)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.skip = nn.Sequential(_convolution(inputs, width, 1, stride), _norm(width, groups))
        if zero_init_residual:
            nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(self.skip(x) + y)


def _convolution(inputs: int, width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width for stride 1; initialized as in He et al. 2015.

    It has no bias, because the norm behind it has one.
    """
    conv = nn.Conv2d(inputs, width, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _norm(width: int, groups: int | None) -> nn.BatchNorm2d | nn.GroupNorm:
    return nn.BatchNorm2d(width) if groups is None else nn.GroupNorm(groups, width)


def _blocks_per_stage(blocks: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    if isinstance(blocks, int):
        return (count("model.blocks", blocks),) * num_stages
    per_stage = sizes("model.blocks", blocks)
    if len(per_stage) != num_stages:
        raise ConfigError(
            f"model.blocks={shown(per_stage)}: needs one number per stage, and model.widths has {num_stages}"
        )
    return per_stage


def _groups(groups: int, widths: Sequence[int]) -> int:
    count("model.groups", groups)
    for width in widths:
        if width % groups:
            fitting = [g for g in range(1, width + 1) if all(w % g == 0 for w in widths)]
            nearest = min(fitting, key=lambda g: abs(g - groups))
            raise ConfigError(
                f"model.groups={groups}: doesn't divide the width {width} of "
                f"model.widths={shown(widths)}; {nearest} would"
            )
    return groups
