"""The layers of the VAE, under the parameter names of diffusers and in its order of registration, so that weights
and optimizer states move both ways without renaming or sorting.

Every layer maps [B, C, H, W] to [B, C', H', W'] and holds no state beside its parameters. It is written in plain torch;
`engine/layers.py` has subclasses that compute the same faster. The networks are in `networks.py`.

Arguments are named and ordered as diffusers has them, since code written for its blocks calls these: `temb`, a tensor
that is added between the two convolutions of a residual block, is None in every VAE of its own.

Shapes: B batch, C channels, H W rows and columns, n = H * W attention tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

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

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(input_tensor)))
        if temb is not None:
            h = h + temb
        h = self.conv2(self.nonlinearity(self.norm2(h)))
        return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + h


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
        # diffusers' object for the same formula, given by whoever adopts a VAE: pipelines look at its type
        self.processor: Any = None

        self.equal_processors: tuple[type, ...] = ()
        """Classes of diffusers' processors that compute this formula too."""

    def get_processor(self) -> Any:
        """What diffusers' `attn_processors` lists for this layer."""
        return self.processor

    def set_processor(self, processor: Any) -> None:
        """What diffusers' `set_attn_processor` calls. Raises ValueError for one that computes something else."""
        if type(processor) not in self.equal_processors:
            raise ValueError(
                f"this attention layer cannot compute by a {type(processor).__name__}: use diffusers' own network for "
                "it, which restore_vae(vae) puts back"
            )
        self.processor = processor

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        x = hidden_states
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # [B, 1, n, C]
        h = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        h = self.to_out[0](h)  # [B, 1, n, C]
        return x + h[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """3x3 convolution with stride 2: [B, C, H, W] -> [B, C, H // 2, W // 2].

    The padding is asymmetric (right and bottom only), as in the VAE of Rombach et al. 2022, arXiv:2112.10752.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour times two, or to `output_size`, then a 3x3 convolution: [B, C, H, W] -> [B, C, 2H, 2W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        if output_size is None:
            return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(hidden_states, size=output_size, mode="nearest"))


@dataclass(frozen=True)
class LayerTypes:
    """The classes that a network is built from: those of this file, or subclasses that compute the same."""

    resnet: type[ResnetBlock2D] = ResnetBlock2D
    upsample: type[Upsample] = Upsample


@dataclass(frozen=True)
class Shape:
    """What the residual blocks of a stage are made of."""

    in_channels: int
    out_channels: int
    layers: int
    groups: int
    activation: str
    attention: bool
    types: LayerTypes = LayerTypes()


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
            shape.types.resnet(before, after, shape.groups, shape.activation)
            for before, after in pairwise(widths)
        )

    @property
    def widest(self) -> int:
        """Channels of the widest map that the stage reads or makes."""
        return max(self.in_channels, self.out_channels)

    def refine(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H, W]."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions:
                x = self.attentions[index](x)
        return x


class DownStage(Stage):
    """A stage of the encoder: refine, then halve the resolution unless it is the last one."""

    def __init__(self, shape: Shape, downsample: bool) -> None:
        super().__init__(shape)
        self.downsamplers = nn.ModuleList([Downsample(shape.out_channels)]) if downsample else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.refine(hidden_states)
        for downsampler in self.downsamplers or ():
            x = downsampler(x)
        return x


class UpStage(Stage):
    """A stage of the decoder: refine, then double the resolution unless it is the last one."""

    def __init__(self, shape: Shape, upsample: bool) -> None:
        super().__init__(shape)
        self.upsamplers = nn.ModuleList([shape.types.upsample(shape.out_channels)]) if upsample else None

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        x = self.refine(hidden_states, temb)
        for upsampler in self.upsamplers or ():
            x = upsampler(x)
        return x


# The name under which diffusers lists what gradient checkpointing was switched on in.
class UNetMidBlock2D(nn.Module):
    """The lowest resolution: residual block, attention (most codecs can do without), residual block."""

    def __init__(
        self,
        channels: int,
        groups: int,
        activation: str,
        attention: bool,
        types: LayerTypes = LayerTypes(),
    ) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(types.resnet(channels, channels, groups, activation) for _ in range(2))
        self.gradient_checkpointing = False  # set by diffusers; the networks recompute this block as a whole

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        x = self.resnets[0](hidden_states, temb)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, temb)
