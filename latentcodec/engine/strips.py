"""Encoder and Decoder, computed layer by layer over strips of rows: exact, with little memory, and fast.

A feature map is a sequence of strips. A residual block reads one strip at a time together with one row of each
neighbour, then normalises, activates and convolves it while it is in the cache. The result is exact, because a layer
ends before the next one begins: a group norm uses the statistics of the whole map, which were gathered while its strips
were written, and attention sees every position. Little memory is needed, because strips are freed as they are read: a
block holds two maps. Where two are too many, the inner map is computed a second time instead of kept, and the block
holds one.

This is how the networks run when no gradient is asked for; training runs the modules of `layers.py`. The pointwise
functions are in `ops/pointwise.py`, the convolutions of a strip in `ops/convolutions.py`.

Shapes: B batch, C channels, H W rows and columns of a map, r rows of a strip, n = H W. Strips are [B, r, W, C].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcodec.engine.maps import Map, kept_map, kept_or_remade
from latentcodec.engine.needs import channels_at_once
from latentcodec.engine.rows import ends_for, padded, regrouped, seen_ends, with_neighbours
from latentcodec.ops.convolutions import WindowConvolution, window_convolution, window_upsample_convolution
from latentcodec.ops.native.convolution import Workspace
from latentcodec.ops.pointwise import Activation, Kernels, Moments, Norm
from latentcodec.vae.layers import Attention, Downsample, ResnetBlock2D, Stage, Upsample

FUNCTIONS: dict[type[nn.Module], Activation] = {
    nn.SiLU: F.silu,
    nn.GELU: F.gelu,
    nn.Mish: F.mish,
    nn.ReLU: F.relu,
}


@dataclass(frozen=True)
class StripPass:
    """One pass of a network over one batch."""

    dtype: torch.dtype
    """In which everything is computed."""
    kernels: Kernels
    strip_bytes: int
    """Of a strip of a stage's widest map."""
    score_bytes: int
    """Of attention scores at a time, in float32."""
    map_bytes: int
    """Of a stage's maps. Where its inner ones do not fit, they are made again: half the memory, twice the first
    convolutions."""
    scratch: Tensor
    """[0] of `dtype` on the device of the images, to be grown to the largest window."""
    workspace: Workspace | None = None
    """For native convolutions, which are not used without it."""
    convolutions: dict[nn.Module, WindowConvolution] = field(default_factory=dict)
    """By layer, where the pass is recorded: those that it has used."""
    keeps_packed: bool = True
    """Whether what is made of the weights stays after the pass."""

    def encode(self, encoder: Any, x: Tensor) -> list[Tensor]:
        """[B, C, H, W] -> strips of the posterior's moments [B, H // f, W // f, 2c]."""
        stages, width = list(encoder.down_blocks), x.shape[3]
        sizes = [(stage, x.shape[2] >> i, width >> i) for i, stage in enumerate(stages)]
        self._reserve(x, sizes)
        keeps = self._keeps(x, sizes)
        feature = self._conv_in(encoder.conv_in, x, self._rows(stages[0], x, width, x.shape[1]))
        for stage, following in zip(stages, [*stages[1:], stages[-1]], strict=True):
            feature = self._blocks(stage, feature, keeps[stage])
            for layer in stage.downsamplers or ():
                width //= 2
                moments = self.kernels.moments()
                strips = self._downsample(layer, feature, moments)
                feature = kept_map(moments, regrouped(strips, self._rows(following, x, width)))
        feature = self._mid_block(encoder.mid_block, feature, keeps[stages[-1]])
        return self._conv_out(encoder, feature)

    def decode(self, decoder: Any, z: Tensor) -> list[Tensor]:
        """[B, c, h, w] -> strips of the image [B, h f, w f, C]."""
        stages, width = list(decoder.up_blocks), z.shape[3]
        sizes = [(stage, z.shape[2] << i, width << i) for i, stage in enumerate(stages)]
        self._reserve(z, sizes)
        keeps = self._keeps(z, sizes)
        feature = self._conv_in(decoder.conv_in, z, self._rows(stages[0], z, width, z.shape[1]))
        feature = self._mid_block(decoder.mid_block, feature, keeps[stages[0]])
        for stage, following in zip(stages, [*stages[1:], stages[-1]], strict=True):
            feature = self._blocks(stage, feature, keeps[stage])
            for layer in stage.upsamplers or ():
                width *= 2
                feature = self._upsample(layer, feature, self._rows(following, z, width), keeps[following])
        return self._conv_out(decoder, feature)

    # ---- the layers

    def _conv_in(self, layer: nn.Conv2d, x: Tensor, rows: int) -> Map:
        convolve, moments = self._convolution(layer), self.kernels.moments()
        pixels = x.to(self.dtype).permute(0, 2, 3, 1).contiguous()
        ends = ends_for(layer, lambda: (pixels[:, :1], pixels[:, -1:]))
        parts = with_neighbours(pixels.split(rows, dim=1), ends=ends)
        windows = (self._window(*part, None, layer.padding_mode) for part in parts)
        return kept_map(moments, (convolve(window, moments) for window in windows))

    def _blocks(self, stage: Any, feature: Map, keeps: bool) -> Map:
        self._forget_weights()
        for index, block in enumerate(stage.resnets):
            feature = self._residual(block, feature, keeps)
            if stage.attentions:
                feature = self._attention(stage.attentions[index], feature)
        return feature

    def _mid_block(self, block: Any, feature: Map, keeps: bool) -> Map:
        feature = self._residual(block.resnets[0], feature, keeps)
        for layer in block.attentions:
            feature = self._attention(layer, feature)
        return self._residual(block.resnets[1], feature, keeps)

    def _residual(self, block: ResnetBlock2D, feature: Map, keeps: bool) -> Map:
        """shortcut(x) + conv2(norm2(conv1(norm1(x))))."""
        activation = FUNCTIONS[type(block.nonlinearity)]
        norm1 = _norm(feature.moments, block.norm1, activation)
        conv1, conv2 = self._convolution(block.conv1), self._convolution(block.conv2)
        shortcut: Callable[[Tensor], Tensor] = lambda strip: strip  # noqa: E731
        if block.conv_shortcut is not None:
            shortcut = self._convolution(block.conv_shortcut)

        inner, moments = self.kernels.moments(inner=True), self.kernels.moments()

        def branches(last: bool) -> Iterator[tuple[Tensor, Tensor]]:
            ends = ends_for(block.conv1, feature.ends)
            for above, strip, below in with_neighbours(feature.strips(last), ends=ends):
                h = conv1(self._window(above, strip, below, norm1, block.conv1.padding_mode), inner)
                yield h, shortcut(strip) if last else strip

        pairs, inner_ends = kept_or_remade(branches, itemgetter(0), keeps)
        norm2 = _norm(inner, block.norm2, activation)
        around = ends_for(block.conv2, inner_ends)

        def joined() -> Iterator[Tensor]:
            for above, (h, residual), below in with_neighbours(pairs, itemgetter(0), around):
                window = self._window(above, h, below, norm2, block.conv2.padding_mode)
                yield conv2(window, moments, residual)

        return kept_map(moments, joined())

    def _attention(self, layer: Attention, feature: Map) -> Map:
        """x + to_out(softmax(q k^T / sqrt(C)) v), a part of the queries at a time."""
        strips = list(feature.strips(True))
        shapes = [strip.shape for strip in strips]
        x = torch.cat([strip.flatten(1, 2) for strip in strips], 1)  # [B, n, C]
        strips.clear()
        normed = torch.empty_like(x)
        self.kernels.normalise_(normed, x, _norm(feature.moments, layer.group_norm, None))
        q, k, v = (_linear(part, normed) for part in (layer.to_q, layer.to_k, layer.to_v))
        seen = self.kernels.attend(q, k, v, self.score_bytes)
        out = _linear(layer.to_out[0], seen).add_(x)
        parts = out.split([shape[1] * shape[2] for shape in shapes], 1)
        result = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        moments = self.kernels.moments()
        for strip in result:
            moments.add(strip)
        return kept_map(moments, result)

    def _downsample(self, layer: Downsample, feature: Map, moments: Moments) -> Iterator[Tensor]:
        """Zeros right and below, then 3x3 with stride 2; strips have an even number of rows, but for the last."""
        convolve = self._convolution(layer.conv)
        for _, strip, below in with_neighbours(feature.strips(True)):
            batch, rows, columns, channels = strip.shape
            if rows > 1:
                window = self._scratch(batch, rows + 1, columns + 1, channels)
                self.kernels.halving_window_(window, strip, below)
                yield convolve(window, moments)

    def _upsample(self, layer: Upsample, feature: Map, rows: int, keeps: bool) -> Map:
        self._forget_weights()
        settings = self.dtype, self.workspace, self.keeps_packed
        make = window_upsample_convolution
        convolve = self._ready(layer.conv, lambda c: make(c.weight, c.bias, *settings, owner=c))
        moments, padding = self.kernels.moments(), layer.conv.padding_mode
        if padding == "reflect":
            padding = "replicate"  # mirrored at its border, a doubled map has that border again

        def strips(last: bool) -> Iterator[Tensor]:
            ends = ends_for(layer.conv, feature.ends)
            for part in with_neighbours(regrouped(feature.strips(last), max(1, rows // 2)), ends=ends):
                y = convolve(self._window(*part, None, padding), moments if padding == "zeros" else None)
                if padding != "zeros":  # the window was doubled with the columns beside it
                    y = y[:, :, 2:-2].contiguous()
                    moments.add(y)
                yield y

        if keeps:
            return kept_map(moments, strips(True))
        ends = seen_ends(strips(False))
        return Map(moments, strips, lambda: ends)

    def _conv_out(self, network: Any, feature: Map) -> list[Tensor]:
        norm = _norm(feature.moments, network.conv_norm_out, FUNCTIONS[type(network.conv_act)])
        convolve = self._convolution(network.conv_out)
        padding, ends = network.conv_out.padding_mode, ends_for(network.conv_out, feature.ends)
        parts = with_neighbours(feature.strips(True), ends=ends)
        return [convolve(self._window(*part, norm, padding)) for part in parts]

    def _convolution(self, layer: nn.Conv2d) -> WindowConvolution:
        """`layer` for windows, which hold the rows above and below, and columns beside them unless these are zeros."""
        columns = int(layer.padding[1]) if layer.padding_mode == "zeros" else 0
        settings = layer.stride[0], columns, self.dtype, self.workspace, self.keeps_packed
        return self._ready(layer, lambda c: window_convolution(c.weight, c.bias, *settings, owner=c))

    def _ready(self, layer: nn.Conv2d, make: Callable[[nn.Conv2d], WindowConvolution]) -> WindowConvolution:
        """make(layer), once for all passes where they are recorded."""
        if self.workspace is None or not self.workspace.records:
            return make(layer)
        if layer not in self.convolutions:
            self.convolutions[layer] = make(layer)
        return self.convolutions[layer]

    # ---- strips

    def _rows(self, stage: Stage, x: Tensor, width: int, given: int = 0) -> int:
        """Of a strip in `stage`, which is given maps of `given` channels: even, so that strips can be halved."""
        row_bytes = len(x) * width * max(stage.widest, given) * self.dtype.itemsize
        return max(2, self.strip_bytes // row_bytes // 2 * 2)

    def _window(
        self,
        above: Tensor | None,
        strip: Tensor,
        below: Tensor | None,
        norm: Norm | None = None,
        padding: str = "zeros",
    ) -> Tensor:
        """[B, r + 2, W, C]: the strip between the last row above and the first below, zeros outside the image; for
        another `padding` mode [B, r + 2, W + 2, C], and what that mode has outside the image."""
        batch, rows, columns, channels = strip.shape
        window = self._scratch(batch, rows + 2, columns, channels)
        self.kernels.window_(window, above, strip, below, norm)
        return window if padding == "zeros" else padded(window, above is None, below is None, padding)

    def _forget_weights(self) -> None:
        """Free what was prepared of weights for the layers before: theirs were larger than those of the next ones."""
        if self.workspace is not None:
            self.workspace.forget_weights()

    def _keeps(self, x: Tensor, stages: list[tuple[Stage, int, int]]) -> dict[Stage, bool]:
        """Of each stage, given with the height and width of its maps: whether its inner maps fit."""
        item = len(x) * self.dtype.itemsize
        return {
            stage: item * height * width * channels_at_once(stage, True) <= self.map_bytes
            for stage, height, width in stages
        }

    def _reserve(self, x: Tensor, stages: list[tuple[Stage, int, int]]) -> None:
        """Memory for every window, given the stages with the heights and widths of their maps."""
        given = [
            x.shape[1],
            *[0] * len(stages),
        ]  # the first convolution may read more channels than any makes
        largest = max(
            (min(height, self._rows(stage, x, width, channels)) + 2)
            * ((width + 1) * max(stage.widest, channels))
            for (stage, height, width), channels in zip(stages, given, strict=False)
        )
        self.scratch.resize_(len(x) * largest)

    def _scratch(self, *shape: int) -> Tensor:
        """A window for the next convolution, always in the same memory: freed between two strips that stay, windows
        would leave holes that no strip fits into."""
        return self.scratch[: math.prod(shape)].view(shape)


def _norm(moments: Moments, layer: nn.GroupNorm, activation: Activation | None) -> Norm:
    return moments.norm(layer.weight, layer.bias, layer.num_groups, layer.eps, activation)


def _linear(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
