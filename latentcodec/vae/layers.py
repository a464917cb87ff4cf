"""The layers of the VAE, under the parameter names of diffusers and in its order of registration, so that weights
and optimizer states move both ways without renaming or sorting.

Every layer maps [B, C, H, W] to [B, C', H', W'] and holds no state beside its parameters. The network as a whole
is in `autoencoder.py`.

Shapes: B batch, C channels, H W rows and columns, n = H * W attention tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from einops import rearrange
from torch import Tensor, nn

from latentcodec.ops.functional import doubled, normalised

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
}


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group normalisation (Wu & He 2018, arXiv:1803.08494) with the epsilon that every AutoencoderKL uses."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


# diffusers' device maps and offloading keep modules of this class name in one piece (`_no_split_modules`),
# which is why the class is not simply called ResnetBlock.
class ResnetBlock2D(nn.Module):
    """`shortcut(x) + conv2(act(norm2(conv1(act(norm1(x))))))`: a pre-activation residual block.

    [B, in_channels, H, W] -> [B, out_channels, H, W]; the shortcut is the identity where both counts agree.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, activation: str = "silu") -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = ACTIVATIONS[activation]()
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(normalised(x, self.norm1, self.nonlinearity))
        h = self.conv2(normalised(h, self.norm2, self.nonlinearity))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention(nn.Module):
    """`x + to_out(softmax(q k^T / sqrt(C)) v)`: one head over all positions of the normalised map.

    [B, C, H, W] -> [B, C, H, W].
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = group_norm(channels, groups)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list, since diffusers adds a dropout
        self.processor = (
            AttnProcessor2_0()
        )  # what it computes; some pipelines look at its type to upcast the VAE

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        h = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        h = self.to_out[0](h)  # [B, 1, n, C]
        return x + rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """3x3 convolution with stride 2: [B, C, H, W] -> [B, C, H // 2, W // 2].

    The padding is asymmetric (right and bottom only), as in the VAE of Rombach et al. 2022, arXiv:2112.10752.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour times two, then a 3x3 convolution: [B, C, H, W] -> [B, C, 2H, 2W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return doubled(x, self.conv)


@dataclass(frozen=True)
class Shape:
    """What the residual blocks of a stage are made of."""

    in_channels: int
    out_channels: int
    layers: int
    groups: int
    activation: str
    attention: bool


class Stage(nn.Module):
    """The residual blocks of one resolution, each followed by an attention layer where the stage has them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.in_channels, self.out_channels = shape.in_channels, shape.out_channels
        widths = [shape.in_channels] + [shape.out_channels] * shape.layers
        self.attentions = nn.ModuleList(
            Attention(shape.out_channels, shape.groups) for _ in range(shape.layers if shape.attention else 0)
        )
        self.resnets = nn.ModuleList(
            ResnetBlock2D(before, after, shape.groups, shape.activation) for before, after in pairwise(widths)
        )

    def refine(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H, W]."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[index](x)
        return x


class DownStage(Stage):
    """A stage of the encoder: refine, then halve the resolution unless it is the last one."""

    def __init__(self, shape: Shape, downsample: bool) -> None:
        super().__init__(shape)
        self.downsamplers = nn.ModuleList([Downsample(shape.out_channels)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.refine(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
        return x


class UpStage(Stage):
    """A stage of the decoder: refine, then double the resolution unless it is the last one."""

    def __init__(self, shape: Shape, upsample: bool) -> None:
        super().__init__(shape)
        self.upsamplers = nn.ModuleList([Upsample(shape.out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.refine(x)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


# The name under which diffusers lists what gradient checkpointing was switched on in.
class UNetMidBlock2D(nn.Module):
    """The lowest resolution: residual block, attention (most codecs can do without), residual block."""

    def __init__(self, channels: int, groups: int, activation: str, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, groups, activation) for _ in range(2))
        self.gradient_checkpointing = False  # set by diffusers; the networks recompute this block as a whole

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)
