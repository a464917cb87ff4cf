"""The functions of `pointwise.py` for GPUs, in Triton: what is left there of a pass beside the convolutions.

A GPU is short of bytes, not of arithmetic: a map is read and written as seldom as can be. Between two convolutions that
is twice: `finish` adds what the first one left out and gathers the statistics, `window` normalises for the second.
Compiled by inductor, the same functions moved 0.9 to 3.6 TB/s of the 4.3 that an H200 copies with, their first form in
Triton mostly 3.2 to 4.0 (LOG.md, 2026-11-26).

Training takes as many: two passes over a map give a norm and its activation, two over map and gradient the gradient.

The programs that run on the GPU are in `triton_kernels.py`.

Shapes: B batch, n pixels of a strip, C channels, P pieces of a map, W columns; strips are [B, r, W, C], channels last.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from latentcodec.ops import triton_kernels
from latentcodec.ops.pointwise import (
    RMS,
    Activation,
    Kernels,
    Moments,
    Norm,
    compiled_function,
    rms_normalise_,
)

TILE = 8192  # values that a program holds at a time
PROGRAMS = 264  # that a strip is divided among: two for each multiprocessor of a large GPU
SCORES = 4096  # of attention, that a program holds at a time
MERGED = 4096  # values of pieces that a program merges at a time
# Logarithms of the largest weight of attention, relative to that of the reference: sums stay finite with room to spare.
LARGEST = {torch.float32: 60.0, torch.bfloat16: 60.0, torch.float16: 8.0}
NAMES: dict[Activation | None, str] = {
    None: "none",
    F.silu: "silu",
    F.gelu: "gelu",
    F.mish: "mish",
    F.relu: "relu",
}


class PiecewiseMoments(Moments):
    """Mean and variance of every channel of a map, of whose pieces each has its own: [P, B, 3, C] float32.

    The three are the number of pixels, their mean and the sum of the squared distances from it. Merging them (Chan et
    al. 1979) counts the variance between pieces, and nowhere is a large number taken from another.
    """

    fuses_bias_and_residual = True

    def __init__(self, inner: bool) -> None:
        self.inner = inner
        self.parts: list[Tensor] = []
        self.known = False
        self.bias: Tensor | None = None  # that waits for the norm

    def add(self, strip: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        """strip <- strip + bias + residual, in place, rounded once, and counted in; an inner map's bias waits.

        [B, r, W, C], [C] and [B, r, W, C], images contiguous; 2 n C s bytes, or 3 with a residual, or 1 with neither.
        """
        if self.inner:
            self.bias, bias = bias, None
            if self.known:
                return
        batch, rows, columns, channels = strip.shape
        pixels = rows * columns
        width, tile, each, pieces = _pieces(batch, pixels, channels, 1 if residual is not None else 2)
        part = strip.new_empty(pieces, batch, 3, channels, dtype=torch.float32)
        other = strip if residual is None else residual
        triton_kernels.finish[pieces, batch](
            strip,
            strip if bias is None else bias,
            other,
            part,
            pixels,
            each,
            strip.stride(0),
            other.stride(0),
            bias is not None,
            residual is not None,
            channels,
            width,
            tile,
        )
        if not self.known:
            self.parts.append(part)

    def norm(
        self, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: Activation | None
    ) -> Norm:
        """The group norm of this map, whose strips may be made again; weight and bias [C]."""
        self.known = True
        parts = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        pieces, batch, _, channels = parts.shape
        scale, shift = parts.new_empty(2, batch, 1, channels)
        self.mean, self.inverse = parts.new_empty(2, batch, groups, 1)
        members = channels // groups
        width = triton.next_power_of_2(members)
        triton_kernels.merge[groups, batch](
            parts,
            bias if self.bias is None else self.bias,
            weight,
            bias,
            scale,
            shift,
            self.mean,
            self.inverse,
            pieces,
            eps,
            batch,
            channels,
            self.bias is not None,
            members,
            width,
            max(1, MERGED // width),
        )
        return Norm(scale, shift, activation)


class TritonKernels(Kernels):
    """The work between two convolutions, as these kernels do it."""

    def __init__(self) -> None:
        self._rms_normalise_ = compiled_function(rms_normalise_)  # it has no kernel of its own

    def moments(self, inner: bool = False) -> PiecewiseMoments:
        return PiecewiseMoments(inner)

    def normalise_(self, out: Tensor, x: Tensor, norm: Norm | RMS) -> None:
        if isinstance(norm, RMS):
            self._rms_normalise_(out, x, *norm)
        else:
            _run_window(out[:, None], None, x[:, None], None, norm, 0)

    def window_(
        self,
        out: Tensor,
        above: Tensor | None,
        strip: Tensor,
        below: Tensor | None,
        norm: Norm | RMS | None,
    ) -> None:
        if isinstance(norm, RMS):
            super().window_(out, above, strip, below, norm)
            return
        last, first = None if above is None else above[:, -1], None if below is None else below[:, 0]
        _run_window(out, last, strip, first, norm, 1)

    def halving_window_(self, out: Tensor, strip: Tensor, below: Tensor | None) -> None:
        batch, rows, columns, channels = strip.shape
        width, tile = _tile(channels)
        pixels = (rows + 1) * (columns + 1)
        below = strip[:, :0] if below is None else below[:, :1]
        triton_kernels.halving_window[triton.cdiv(pixels, tile), batch](
            out,
            strip,
            below,
            rows,
            columns,
            strip.stride(0),
            below.stride(0),
            below.shape[1],
            channels,
            width,
            tile,
        )

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor, norm: Norm, mean: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, rows, columns, channels = x.shape
        groups, pixels = inverse.shape[1], rows * columns
        members = channels // groups
        width, tile, each, pieces = _pieces(batch, pixels, channels, 2)
        known, shape = (dy, x, norm.scale, norm.shift, mean), (channels, members, width, tile)
        parts = x.new_empty(pieces, batch, 2, channels, dtype=torch.float32)
        triton_kernels.gradient_sums[pieces, batch](*known, parts, pixels, each, *shape, num_warps=8)
        factors, sums = parts.new_empty(2, batch, groups), parts.new_empty(2, batch, channels)
        merged = triton.next_power_of_2(members)
        triton_kernels.merge_gradients[groups, batch](
            parts,
            weight,
            inverse,
            factors,
            sums,
            pieces,
            batch,
            pixels * members,
            channels,
            members,
            merged,
            max(1, MERGED // merged),
        )
        dx = torch.empty_like(x)
        triton_kernels.gradient[triton.cdiv(pixels, tile), batch](
            *known, factors, dx, pixels, batch, *shape, num_warps=8
        )
        dbias, dweight = sums.sum(1).to(weight.dtype)
        return dx, dweight, dbias

    def attend(self, q: Tensor, k: Tensor, v: Tensor, score_bytes: int) -> Tensor:
        """softmax(q k^T / sqrt(C)) v, a part of the queries at a time; all [B, n, C].

        Fused attention stops at 256 channels, and what torch falls back to takes 4.1 ms for the 16,384 positions of
        1024 x 1024 pixels. Scores are float32, so nothing is rounded but the weights.
        """
        out, queries = torch.empty_like(v), max(1, score_bytes // (4 * k.shape[1]))
        for image in zip(q, k, v, out, strict=True):
            for start in range(0, q.shape[1], queries):
                _attend_(*image, slice(start, start + queries))
        return out


def _attend_(q: Tensor, k: Tensor, v: Tensor, out: Tensor, queries: slice) -> None:
    """out <- softmax(q k^T / sqrt(C)) v for some queries of an image; all [n, C]."""
    product = torch.mm if q.dtype == torch.float32 else partial(torch.mm, out_dtype=torch.float32)
    scores = product(q[queries], k.T)
    weights = torch.empty_like(scores, dtype=v.dtype)
    inverse = scores.new_empty(len(scores), 1)
    triton_kernels.weigh[len(scores),](
        scores, weights, inverse, len(k), k.shape[1] ** -0.5, LARGEST[v.dtype], SCORES, num_warps=8
    )
    out[queries] = product(weights, v).mul_(inverse)


def _tile(channels: int, finer: int = 1) -> tuple[int, int]:
    """(a power of 2 that holds the channels, pixels of a tile)."""
    width = triton.next_power_of_2(channels)
    return width, max(1, TILE // finer // width)


def _pieces(batch: int, pixels: int, channels: int, finer: int) -> tuple[int, int, int, int]:
    """(a power of 2 that holds the channels, pixels of a tile, pixels of a piece, pieces of an image).

    `finer` as many programs have tiles so much smaller: better where little is read, or much is held (measured).
    """
    width, tile = _tile(channels, finer)
    each = triton.cdiv(triton.cdiv(pixels, triton.cdiv(PROGRAMS * finer, batch)), tile) * tile
    return width, tile, each, triton.cdiv(pixels, each)


def _run_window(
    out: Tensor, above: Tensor | None, strip: Tensor, below: Tensor | None, norm: Norm | None, border: int
) -> None:
    """out <- strip, normalised, between `border` rows more above and below: rows [B, W, C], or zeros for None."""
    batch, rows, columns, channels = strip.shape
    width, tile = _tile(channels)
    scale, shift, activation = (strip, strip, None) if norm is None else norm
    tiles, row_tiles = triton.cdiv(rows * columns, tile), triton.cdiv(columns, tile)
    triton_kernels.window[tiles + 2 * border * row_tiles, batch](
        out,
        strip if above is None else above,
        strip,
        strip if below is None else below,
        scale,
        shift,
        columns,
        rows * columns,
        tiles,
        row_tiles,
        out.stride(0),
        0 if above is None else above.stride(0),
        strip.stride(0),
        0 if below is None else below.stride(0),
        border,
        above is not None,
        below is not None,
        norm is not None,
        NAMES[activation],
        channels,
        width,
        tile,
    )
