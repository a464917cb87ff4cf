"""The pointwise work of `kernels.py` for GPUs, in Triton: what is left there of a pass beside the convolutions.

A GPU is short of bytes, not of arithmetic: a map is read and written as seldom as can be. Between two convolutions that
is twice: `_finish` adds what the first one left out and gathers the statistics, `_window` normalises for the second.
Compiled by inductor, the same functions moved 0.9 to 3.6 TB/s of the 4.3 that an H200 copies with, their first form in
Triton mostly 3.2 to 4.0 (LOG.md, 2026-11-26).

Shapes: B batch, n pixels of a strip, C channels, P pieces of a map, W columns; strips are [B, r, W, C], channels last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from latentcodec.kernels import Activation, Kernels, Moments, Norm

TILE = 8192  # values that a program holds at a time
PROGRAMS = 264  # that a strip is divided among: two for each multiprocessor of a large GPU
SCORE_BYTES = 256 << 20  # of attention scores at a time, in float32
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

    adds_what_is_left_out = True

    def __init__(self, inner: bool) -> None:
        self.inner = inner
        self.parts: list[Tensor] = []
        self.known = False
        self.bias: Tensor | None = None  # that waits for the norm

    def add(self, strip: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        """strip <- strip + bias + residual, in place, rounded once, and counted in; an inner map's bias waits.

        [B, r, W, C] contiguous, [C] and [B, r, W, C]; 2 n C s bytes, or 3 with a residual, or 1 with neither.
        """
        if self.inner:
            self.bias, bias = bias, None
            if self.known:
                return
        batch, rows, columns, channels = strip.shape
        pixels, width = rows * columns, triton.next_power_of_2(channels)
        tile = max(1, TILE // width)
        each = triton.cdiv(triton.cdiv(pixels, PROGRAMS), tile) * tile
        pieces = triton.cdiv(pixels, each)
        part = strip.new_empty(pieces, batch, 3, channels, dtype=torch.float32)
        other = strip if residual is None else residual
        _finish[pieces, batch](
            strip,
            strip if bias is None else bias,
            other,
            part,
            pixels,
            each,
            other.stride(0),
            bias is not None,
            residual is not None,
            channels,
            width,
            tile,
        )
        if not self.known:
            self.parts.append(part)

    def norm(self, layer: nn.GroupNorm, activation: Activation | None) -> Norm:
        """`layer` on this map, and on what of it has yet to come."""
        self.known = True
        parts = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        pieces, batch, _, channels = parts.shape
        scale, shift = parts.new_empty(2, batch, 1, channels)
        members = channels // layer.num_groups
        width = triton.next_power_of_2(members)
        _merge[layer.num_groups, batch](
            parts,
            layer.bias if self.bias is None else self.bias,
            layer.weight,
            layer.bias,
            scale,
            shift,
            pieces,
            layer.eps,
            batch,
            channels,
            self.bias is not None,
            members,
            width,
            64,
        )
        return Norm(scale, shift, activation)


class TritonKernels(Kernels):
    """The work between two convolutions, as these kernels do it."""

    def __init__(self) -> None:
        pass

    def moments(self, inner: bool = False) -> PiecewiseMoments:
        return PiecewiseMoments(inner)

    def normalise_(self, out: Tensor, x: Tensor, norm: Norm) -> None:
        _run_window(out[:, None], None, x[:, None], None, norm, 0)

    def window_(
        self, out: Tensor, above: Tensor | None, strip: Tensor, below: Tensor | None, norm: Norm | None
    ) -> None:
        last, first = None if above is None else above[:, -1], None if below is None else below[:, 0]
        _run_window(out, last, strip, first, norm, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(C)) v, a part of the queries at a time; all [B, n, C].

        Fused attention stops at 256 channels, and what torch falls back to takes 4.1 ms for the 16,384 positions of
        1024 x 1024 pixels. Scores are float32, so nothing is rounded but the weights.
        """
        batch, positions, channels = q.shape
        out = torch.empty_like(v)
        queries = max(1, SCORE_BYTES // (4 * positions))
        for image in range(batch):
            keys = k[image].T
            for start in range(0, positions, queries):
                part = q[image, start : start + queries]
                half = part.dtype != torch.float32
                scores = torch.mm(part, keys, out_dtype=torch.float32) if half else torch.mm(part, keys)
                weights = torch.empty_like(scores, dtype=v.dtype)
                _softmax[len(scores),](scores, weights, positions, channels**-0.5, 4096, num_warps=8)
                torch.mm(weights, v[image], out=out[image, start : start + queries])
        return out


def _run_window(
    out: Tensor, above: Tensor | None, strip: Tensor, below: Tensor | None, norm: Norm | None, border: int
) -> None:
    """out <- strip, normalised, between `border` rows more above and below: rows [B, W, C], or zeros for None."""
    batch, rows, columns, channels = strip.shape
    width = triton.next_power_of_2(channels)
    tile = max(1, TILE // width)
    scale, shift, activation = (strip, strip, None) if norm is None else norm
    tiles, row_tiles = triton.cdiv(rows * columns, tile), triton.cdiv(columns, tile)
    _window[tiles + 2 * border * row_tiles, batch](
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


@triton.jit
def _finish(
    X, BIAS, RESIDUAL, PARTS, pixels, each, residual_stride,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A piece of `each` pixels: `PiecewiseMoments.add`."""
    piece, image = tl.program_id(0), tl.program_id(1)
    first = piece.to(tl.int64) * each
    last = tl.minimum(first + each, pixels)
    c = tl.arange(0, WIDTH)[None, :]
    X += image.to(tl.int64) * pixels * C
    RESIDUAL += image * residual_stride
    bias = tl.zeros([1, WIDTH], tl.float32)
    if HAS_BIAS:
        bias += tl.load(BIAS + c, mask=c < C, other=0.0).to(tl.float32)
    pivot = tl.zeros([1, WIDTH], tl.float32)
    distance = tl.zeros([TILE, WIDTH], tl.float32)
    square = tl.zeros([TILE, WIDTH], tl.float32)
    for start in range(first, last, TILE):
        i = start + tl.arange(0, TILE)[:, None]
        here = (i < last) & (c < C)
        x = tl.load(X + i * C + c, mask=here, other=0.0).to(tl.float32) + bias
        if HAS_RESIDUAL:
            x += tl.load(RESIDUAL + i * C + c, mask=here, other=0.0).to(tl.float32)
        rounded = x.to(X.dtype.element_ty)
        if HAS_BIAS or HAS_RESIDUAL:
            tl.store(X + i * C + c, rounded, mask=here)
        x = tl.where(here, rounded.to(tl.float32), 0.0)
        if start == first:  # near the mean, so that the squares below are not large
            pivot = tl.sum(x, 0)[None, :] / tl.minimum(last - first, TILE).to(tl.float32)
        d = tl.where(here, x - pivot, 0.0)
        distance += d
        square += d * d
    count = (last - first).to(tl.float32)
    sums, squares = tl.sum(distance, 0)[None, :], tl.sum(square, 0)[None, :]
    out = PARTS + (piece * tl.num_programs(1) + image) * 3 * C + c
    tl.store(out, tl.zeros([1, WIDTH], tl.float32) + count, mask=c < C)
    tl.store(out + C, pivot + sums / count, mask=c < C)
    tl.store(out + 2 * C, squares - sums * sums / count, mask=c < C)


@triton.jit
def _merge(
    PARTS, WAITING, WEIGHT, BIAS, SCALE, SHIFT, pieces, eps, batch,
    C: tl.constexpr, WAITS: tl.constexpr, MEMBERS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A group of one image: `PiecewiseMoments.norm`, in float64."""
    group, image = tl.program_id(0), tl.program_id(1)
    member = tl.arange(0, WIDTH)[None, :]
    c, known = group * MEMBERS + member, member < MEMBERS
    waiting = tl.zeros([1, WIDTH], tl.float64)  # the bias that is not in the map yet
    if WAITS:
        waiting += tl.load(WAITING + c, mask=known, other=0.0).to(tl.float64)
    total = tl.zeros([TILE, WIDTH], tl.float64)
    number = tl.zeros([TILE, WIDTH], tl.float64)
    for start in range(0, pieces, TILE):
        p = start + tl.arange(0, TILE)[:, None]
        here = (p < pieces) & known
        part = PARTS + (p * batch + image) * 3 * C + c
        count = tl.load(part, mask=here, other=0.0).to(tl.float64)
        number += count
        total += count * (tl.load(part + C, mask=here, other=0.0).to(tl.float64) + waiting)
    values = tl.sum(number)
    mean = tl.sum(total) / values
    squares = tl.zeros([TILE, WIDTH], tl.float64)
    for start in range(0, pieces, TILE):
        p = start + tl.arange(0, TILE)[:, None]
        here = (p < pieces) & known
        part = PARTS + (p * batch + image) * 3 * C + c
        count = tl.load(part, mask=here, other=0.0).to(tl.float64)
        distance = tl.load(part + C, mask=here, other=0.0).to(tl.float64) + waiting - mean
        within = tl.load(part + 2 * C, mask=here, other=0.0).to(tl.float64)
        squares += within + count * distance * distance
    inverse = 1.0 / tl.sqrt(tl.sum(squares) / values + eps)
    scale = tl.load(WEIGHT + c, mask=known, other=0.0).to(tl.float64) * inverse
    shift = tl.load(BIAS + c, mask=known, other=0.0).to(tl.float64) + (waiting - mean) * scale
    tl.store(SCALE + image * C + c, scale.to(tl.float32), mask=known)
    tl.store(SHIFT + image * C + c, shift.to(tl.float32), mask=known)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "mish":  # x tanh(log u) of u = 1 + e^x is x (u^2 - 1) / (u^2 + 1)
        e = tl.exp(tl.minimum(x, 20.0))
        x = x * (e * e + 2.0 * e) / (e * e + 2.0 * e + 2.0)
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def _move(
    OUT, X, start, pixels, SCALE, SHIFT, KNOWN: tl.constexpr, HAS_NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    C: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of pixels from X to OUT, normalised; zeros where X is not known."""
    i = start + tl.arange(0, TILE)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    here = (i < pixels) & (c < C)
    if KNOWN:
        x = tl.load(X + i * C + c, mask=here, other=0.0)
        if HAS_NORM:
            scale = tl.load(SCALE + c, mask=c < C, other=0.0)
            shift = tl.load(SHIFT + c, mask=c < C, other=0.0)
            x = _activated(x.to(tl.float32) * scale + shift, ACTIVATION).to(X.dtype.element_ty)
    else:
        x = tl.zeros([TILE, WIDTH], OUT.dtype.element_ty)
    tl.store(OUT + i * C + c, x, mask=here)


@triton.jit
def _window(
    OUT, ABOVE, STRIP, BELOW, SCALE, SHIFT, columns, pixels, tiles, row_tiles,
    out_stride, above_stride, strip_stride, below_stride,
    BORDER: tl.constexpr, HAS_ABOVE: tl.constexpr, HAS_BELOW: tl.constexpr, HAS_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of the strip, or of the row above or below it: `window_` with a border of one row, else `normalise_`."""
    tile, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    OUT += image * out_stride
    SCALE += image * C
    SHIFT += image * C
    if tile < tiles:
        _move(
            OUT + BORDER * columns * C, STRIP + image * strip_stride, tile * TILE, pixels, SCALE, SHIFT,
            True, HAS_NORM, ACTIVATION, C, WIDTH, TILE,
        )  # fmt: skip
    elif tile < tiles + row_tiles:
        _move(
            OUT, ABOVE + image * above_stride, (tile - tiles) * TILE, columns, SCALE, SHIFT,
            HAS_ABOVE, HAS_NORM, ACTIVATION, C, WIDTH, TILE,
        )  # fmt: skip
    else:
        _move(
            OUT + (columns + pixels) * C, BELOW + image * below_stride, (tile - tiles - row_tiles) * TILE, columns,
            SCALE, SHIFT, HAS_BELOW, HAS_NORM, ACTIVATION, C, WIDTH, TILE,
        )  # fmt: skip


@triton.jit
def _softmax(SCORES, WEIGHTS, positions, factor, TILE: tl.constexpr):
    """A row of weights <- softmax(factor scores): first the largest score and the sum, then the weights."""
    row = tl.program_id(0).to(tl.int64) * positions
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in range(0, positions, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(SCORES + row + i, mask=i < positions, other=float("-inf")) * factor
        before, largest = largest, tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), 0)
    for start in range(0, positions, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(SCORES + row + i, mask=i < positions, other=float("-inf")) * factor
        tl.store(
            WEIGHTS + row + i, (tl.exp(x - largest) / total).to(WEIGHTS.dtype.element_ty), mask=i < positions
        )
