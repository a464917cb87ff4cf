"""The VAEs of Qwen-Image and Wan on one image: their own weights in two dimensions.

These classes treat an image as a clip of one frame. A causal convolution over one frame sees zeros before it, so only
its last temporal tap counts: a 2-D convolution with a third of the multiplications. Layers that change the frame rate
do nothing to a first frame. What is left is the network of `networks.py` with another norm.

The objects here hold diffusers' modules and read their weights at each call; they own none. So the class keeps its
modules, which it counts and to which it hands clips.

Shapes: B batch, C channels, H W rows and columns of a map [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_NORM = 1e-12  # that torch's `normalize` divides by


class LastTap:
    """A causal convolution on one frame: [B, C, H, W] -> [B, C', H', W'], with the last temporal tap of `source`."""

    def __init__(self, source: Any) -> None:
        self.source = source

    @property
    def weight(self) -> Tensor:
        """[C', C, k, k], a view."""
        weight: Tensor = self.source.weight
        return weight if weight.ndim == 4 else weight[:, :, -1]

    @property
    def bias(self) -> Tensor | None:
        """[C']."""
        bias: Tensor | None = self.source.bias
        return bias

    @property
    def stride(self) -> tuple[int, int]:
        """Along rows and columns; that of time has no meaning for one frame."""
        rows, columns = self.source.stride[-2:]
        return rows, columns

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros at each side; those before the first frame are what makes the last tap enough."""
        left, _, above, *_ = self.source._padding
        return above, left

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """x / |x| sqrt(C) gamma, with |x| over the channels of each pixel (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    source: Any

    @property
    def gain(self) -> Tensor:
        """[C]: sqrt(C) gamma."""
        gamma: Tensor = self.source.gamma
        return gamma.flatten() * gamma.numel() ** 0.5

    def __call__(self, x: Tensor) -> Tensor:
        normed = F.normalize(x.float() if x.dtype != torch.float64 else x, dim=1, eps=SMALLEST_NORM).to(
            x.dtype
        )
        return normed * self.gain[:, None, None]


class Residual:
    """`shortcut(x) + conv2(act(norm2(conv1(act(norm1(x))))))`."""

    def __init__(self, source: Any) -> None:
        self.norm1, self.norm2 = RMSNorm(source.norm1), RMSNorm(source.norm2)
        self.conv1, self.conv2 = LastTap(source.conv1), LastTap(source.conv2)
        self.nonlinearity: nn.Module = source.nonlinearity
        plain = isinstance(source.conv_shortcut, nn.Identity)
        self.conv_shortcut = None if plain else LastTap(source.conv_shortcut)

    def __call__(self, x: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = self.conv2(self.nonlinearity(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention:
    """`x + proj(softmax(q k^T / sqrt(C)) v)`: one head over all positions of the normalised map."""

    def __init__(self, source: Any) -> None:
        self.norm = RMSNorm(source.norm)
        self.to_qkv: nn.Conv2d = source.to_qkv
        self.proj: nn.Conv2d = source.proj

    def __call__(self, x: Tensor) -> Tensor:
        tokens = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None]  # [B, 1, n, 3C]
        q, k, v = tokens.chunk(3, dim=3)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


@dataclass(frozen=True, eq=False)
class Averages:
    """The shortcut around a stage of the encoder: pixels become channels, neighbouring channels their mean.

    Where the stage also halves the frame rate, the class puts zeros in front of a first frame: half of each mean.
    """

    source: Any

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H / s, W / s]."""
        s, t = self.source.factor_s, self.source.factor_t
        x = F.pixel_unshuffle(x, s).unflatten(1, (x.shape[1], s * s))
        x = torch.cat([torch.zeros_like(x)] * (t - 1) + [x], 2).flatten(1, 2)
        return x.unflatten(1, (self.source.out_channels, self.source.group_size)).mean(2)


@dataclass(frozen=True, eq=False)
class Copies:
    """The shortcut around a stage of the decoder: each channel several times, as channels and as pixels."""

    source: Any

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H s, W s], of the last of the frames that it makes of a first one."""
        s, t = self.source.factor_s, self.source.factor_t
        x = x.repeat_interleave(self.source.repeats, 1)
        x = x.unflatten(1, (self.source.out_channels, t, s * s))[:, :, -1]
        return F.pixel_shuffle(x.flatten(1, 2), s)


@dataclass(frozen=True, eq=False)
class Stage:
    """The residual blocks of one resolution, the convolution that leaves it, and the shortcut around both."""

    resnets: list[Residual]
    resample: nn.Conv2d | None
    """Of a halved or doubled map; None in the last stage."""
    shortcut: Averages | Copies | None

    @property
    def in_channels(self) -> int:
        """Channels of the map that comes in."""
        return int(self.resnets[0].conv1.weight.shape[1])

    @property
    def out_channels(self) -> int:
        """Channels of the residual blocks' result."""
        return int(self.resnets[-1].conv2.weight.shape[0])

    @property
    def widest(self) -> int:
        """Channels of the widest map that the stage reads or makes."""
        return max(self.in_channels, self.out_channels)


class Middle:
    """The lowest resolution: residual block, then attention and residual block, once or more."""

    def __init__(self, source: Any) -> None:
        self.resnets = [Residual(block) for block in source.resnets]
        self.attentions = [Attention(layer) for layer in source.attentions]

    def __call__(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x))
        return x


class ImageEncoder:
    """Image to posterior moments before `quant_conv`: [B, C, H, W] -> [B, 2s, H / g, W / g] (mean, log-variance)."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.conv_in, self.conv_out = LastTap(source.conv_in), LastTap(source.conv_out)
        self.stages = list(_down_stages(source.down_blocks))
        self.middle = Middle(source.mid_block)
        self.norm_out = RMSNorm(source.norm_out)
        self.nonlinearity: nn.Module = source.nonlinearity

    def __call__(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.stages:
            before = x
            for resnet in stage.resnets:
                x = resnet(x)
            if stage.resample is not None:
                x = stage.resample(F.pad(x, (0, 1, 0, 1)))
            if stage.shortcut is not None:
                x = x + stage.shortcut(before)
        return self.conv_out(self.nonlinearity(self.norm_out(self.middle(x))))


class ImageDecoder:
    """Latents after `post_quant_conv` to image: [B, s, H / g, W / g] -> [B, C, H, W], not clamped."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.conv_in, self.conv_out = LastTap(source.conv_in), LastTap(source.conv_out)
        self.middle = Middle(source.mid_block)
        self.stages = [_up_stage(block) for block in source.up_blocks]
        self.norm_out = RMSNorm(source.norm_out)
        self.nonlinearity: nn.Module = source.nonlinearity

    def __call__(self, z: Tensor) -> Tensor:
        x = self.middle(self.conv_in(z))
        for stage in self.stages:
            before = x
            for resnet in stage.resnets:
                x = resnet(x)
            if stage.resample is not None:
                x = stage.resample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            if stage.shortcut is not None:
                x = x + stage.shortcut(before)
        return self.conv_out(self.nonlinearity(self.norm_out(x)))


def to_channels(x: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, C p p, H / p, W / p], as the class arranges the pixels of a patch."""
    return _turned(F.pixel_unshuffle(x, patch), patch)


def to_pixels(x: Tensor, patch: int) -> Tensor:
    """The inverse of `to_channels`."""
    return F.pixel_shuffle(_turned(x, patch), patch)


def _turned(x: Tensor, patch: int) -> Tensor:
    """Pixels of a patch by columns instead of by rows, or the other way round, which is the same."""
    return x.unflatten(1, (-1, patch, patch)).transpose(2, 3).flatten(1, 3)


def _down_stages(blocks: Any) -> Iterator[Stage]:
    """Stages out of blocks that are stages already, or out of a flat list of residual blocks and downsamplers."""
    resnets: list[Residual] = []
    for block in blocks:
        if hasattr(block, "avg_shortcut"):
            yield Stage(
                [Residual(resnet) for resnet in block.resnets],
                None if block.downsampler is None else _convolution(block.downsampler),
                Averages(block.avg_shortcut),
            )
        elif hasattr(block, "resample"):
            yield Stage(resnets, _convolution(block), None)
            resnets = []
        else:
            resnets.append(Residual(block))
    if resnets:
        yield Stage(resnets, None, None)


def _up_stage(block: Any) -> Stage:
    upsamplers = [block.upsampler] if hasattr(block, "upsampler") else block.upsamplers or [None]
    shortcut = getattr(block, "avg_shortcut", None)
    return Stage(
        [Residual(resnet) for resnet in block.resnets],
        None if upsamplers[0] is None else _convolution(upsamplers[0]),
        None if shortcut is None else Copies(shortcut),
    )


def _convolution(resample: Any) -> nn.Conv2d:
    """Of a layer that pads or doubles first, in a sequence of two, which is what it does to a first frame."""
    layer: nn.Conv2d = resample.resample[1]
    return layer
