"""Networks whose norms look at one pixel at a time, as one stream of row strips: exact, and leaner than any map.

A norm by the root mean square over channels needs no statistics of the map. So a layer need not end before the next
begins: each asks the layer before it for a strip, with a row of each neighbour, and hands one on. What is in memory at
a time are some strips of each layer; only attention gathers its whole map, at the lowest resolution.

The layers are those of `vae/causal.py`; the neighbours of a strip are found as in `strips.py`, by `rows.py`.

Shapes: B batch, C channels, H W rows and columns of a map, r rows of a strip, n = H W. Strips are [B, r, W, C].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import tee
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcodec.engine.rows import regrouped, with_neighbours
from latentcodec.engine.strips import FUNCTIONS
from latentcodec.ops.convolutions import WindowConvolution, window_convolution, window_upsample_convolution
from latentcodec.ops.native.convolution import Workspace
from latentcodec.ops.pointwise import RMS, Kernels
from latentcodec.vae.causal import (
    Attention,
    Averages,
    Copies,
    ImageDecoder,
    ImageEncoder,
    Middle,
    Residual,
    RMSNorm,
    Stage,
)

Strips = Iterator[Tensor]


@dataclass(frozen=True)
class StreamPass:
    """One pass of a network over one batch."""

    dtype: torch.dtype
    """In which everything is computed."""
    kernels: Kernels
    strip_bytes: int
    """Of a strip of a stage's widest map."""
    score_bytes: int
    """Of attention scores at a time, in float32."""
    scratch: Tensor
    """[0] of `dtype` on the device of the images, to be grown to the largest window."""
    workspace: Workspace | None = None
    """For Winograd's convolutions, which are not used without it."""
    keeps_packed: bool = True
    """Whether prepared weights stay in memory between passes."""

    def encode(self, encoder: ImageEncoder, x: Tensor) -> list[Tensor]:
        """[B, C, H, W] -> strips of the posterior's parameters [B, H // g, W // g, 2s], before `quant_conv`."""
        stages, width = encoder.stages, x.shape[3]
        self._reserve(x, [(stage, x.shape[2] >> i, width >> i) for i, stage in enumerate(stages)])
        strips = self._conv_in(encoder.conv_in, x, self._rows(stages[0], x, width))
        for stage, following in zip(stages, [*stages[1:], stages[-1]], strict=True):
            halves = stage.resample is not None
            strips = self._down(stage, strips)
            if halves:
                width //= 2
                strips = regrouped(strips, self._rows(following, x, width))
        return self._leave(encoder, self._middle(encoder.middle, strips))

    def decode(self, decoder: ImageDecoder, z: Tensor) -> list[Tensor]:
        """[B, s, h, w] after `post_quant_conv` -> strips of the image [B, h g, w g, C], not clamped."""
        stages, width = decoder.stages, z.shape[3]
        self._reserve(z, [(stage, z.shape[2] << i, width << i) for i, stage in enumerate(stages)])
        strips = self._conv_in(decoder.conv_in, z, self._rows(stages[0], z, width))
        strips = self._middle(decoder.middle, strips)
        for stage, following in zip(stages, [*stages[1:], stages[-1]], strict=True):
            if stage.resample is not None:
                width *= 2
            strips = self._up(stage, strips, self._rows(following, z, width))
        return self._leave(decoder, strips)

    # ---- the layers

    def _conv_in(self, layer: Any, x: Tensor, rows: int) -> Strips:
        strips = x.to(self.dtype).permute(0, 2, 3, 1).contiguous().split(rows, dim=1)
        return self._convolved(self._convolution(layer), strips, None)

    def _leave(self, network: ImageEncoder | ImageDecoder, strips: Strips) -> list[Tensor]:
        norm = self._norm(network.norm_out, network.nonlinearity)
        return list(self._convolved(self._convolution(network.conv_out), strips, norm))

    def _middle(self, block: Middle, strips: Strips) -> Strips:
        strips = self._residual(block.resnets[0], strips)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            strips = self._residual(resnet, self._attention(attention, strips))
        return strips

    def _residual(self, block: Residual, strips: Strips) -> Strips:
        """shortcut(x) + conv2(norm2(conv1(norm1(x))))."""
        strips, around = tee(strips)
        norm1, norm2 = (self._norm(layer, block.nonlinearity) for layer in (block.norm1, block.norm2))
        if block.conv_shortcut is not None:
            around = map(self._convolution(block.conv_shortcut), around)
        inner = self._convolved(self._convolution(block.conv1), strips, norm1)
        return self._convolved(self._convolution(block.conv2), inner, norm2, around)

    def _down(self, stage: Stage, strips: Strips) -> Strips:
        """A stage of the encoder; strips have an even number of rows, but for the last."""
        around: Strips | None = None
        if stage.shortcut is not None:
            strips, before = tee(strips)
            around = _through(stage.shortcut, before)
        for block in stage.resnets:
            strips = self._residual(block, strips)
        if stage.resample is not None:
            return self._halved(self._convolution(stage.resample), strips, around)
        return (
            strips if around is None else (strip + added for strip, added in zip(strips, around, strict=True))
        )

    def _halved(self, convolve: WindowConvolution, strips: Strips, around: Strips | None) -> Strips:
        """Zeros right and below, then 3x3 with stride 2, plus the strips of `around`."""
        for _, strip, below in with_neighbours(strips):
            batch, rows, columns, channels = strip.shape
            if rows > 1:
                residual = None if around is None else next(around)
                window = self._scratch(batch, rows + 1, columns + 1, channels)
                self.kernels.halving_window_(window, strip, below)
                yield convolve(window, None, residual)

    def _up(self, stage: Stage, strips: Strips, rows: int) -> Strips:
        """A stage of the decoder, in strips of `rows` where it doubles the map."""
        before: Strips | None = None
        if stage.shortcut is not None:
            strips, before = tee(strips)
        for block in stage.resnets:
            strips = self._residual(block, strips)
        if stage.resample is None:
            return strips
        settings = self.dtype, self.workspace, self.keeps_packed
        layer = stage.resample
        convolve = window_upsample_convolution(layer.weight, layer.bias, *settings, owner=layer)
        rows = max(1, rows // 2)
        around = None if before is None else _through(stage.shortcut, regrouped(before, rows))
        return self._convolved(convolve, regrouped(strips, rows), None, around)

    def _attention(self, layer: Attention, strips: Strips) -> Strips:
        """x + proj(softmax(q k^T / sqrt(C)) v), a part of the queries at a time."""
        shapes, flat = [], []
        for strip in strips:
            shapes.append(strip.shape)
            flat.append(strip.flatten(1, 2))
        x = torch.cat(flat, 1)  # [B, n, C]
        flat.clear()
        normed = torch.empty_like(x)
        self.kernels.normalise_(normed, x, self._norm(layer.norm, None))
        q, k, v = _linear(layer.to_qkv, normed).split(x.shape[2], 2)
        out = _linear(layer.proj, self.kernels.attend(q, k, v, self.score_bytes)).add_(x)
        del x, normed, q, k, v
        parts = out.split([shape[1] * shape[2] for shape in shapes], 1)
        return iter([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])

    # ---- strips

    def _convolved(
        self,
        convolve: WindowConvolution,
        strips: Iterable[Tensor],
        norm: RMS | None,
        around: Strips | None = None,
    ) -> Strips:
        """Each strip with a row of its neighbours, normalised and convolved, plus the strip of `around`."""
        for above, strip, below in with_neighbours(strips):
            residual = None if around is None else next(around)
            batch, rows, columns, channels = strip.shape
            window = self._scratch(batch, rows + 2, columns, channels)
            self.kernels.window_(window, above, strip, below, norm)
            yield convolve(window, None, residual)

    def _norm(self, layer: RMSNorm, activation: torch.nn.Module | None) -> RMS:
        return RMS(layer.gain, None if activation is None else FUNCTIONS[type(activation)])

    def _convolution(self, layer: Any) -> WindowConvolution:
        """`layer`, with the last temporal tap where it has several, for windows without columns beside them."""
        source = getattr(layer, "source", layer)
        settings = layer.stride[0], int(layer.padding[1]), self.dtype, self.workspace, self.keeps_packed
        return window_convolution(source.weight, source.bias, *settings, owner=source)

    def _rows(self, stage: Stage, x: Tensor, width: int) -> int:
        """Of a strip in `stage`: even, so that strips can be halved."""
        row_bytes = len(x) * width * stage.widest * self.dtype.itemsize
        return max(2, self.strip_bytes // row_bytes // 2 * 2)

    def _reserve(self, x: Tensor, stages: list[tuple[Stage, int, int]]) -> None:
        """Memory for every window, given the stages with the heights and widths of their maps."""
        largest = max(
            (min(height, self._rows(stage, x, width)) + 2) * (width + 1) * max(stage.widest, x.shape[1])
            for stage, height, width in stages  # the first convolution may read more channels than any makes
        )
        self.scratch.resize_(len(x) * largest)

    def _scratch(self, *shape: int) -> Tensor:
        """A window for the next convolution, always in the same memory; each is read before the next is filled."""
        return self.scratch[: math.prod(shape)].view(shape)


def _through(shortcut: Averages | Copies | None, strips: Strips) -> Strips:
    """Each strip through a shortcut between channels and pixels."""
    assert shortcut is not None
    for strip in strips:
        yield shortcut(strip.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


def _linear(layer: Any, x: Tensor) -> Tensor:
    """A 1x1 convolution of [B, n, C]."""
    return F.linear(x, layer.weight.to(x.dtype).flatten(1), layer.bias.to(x.dtype))
