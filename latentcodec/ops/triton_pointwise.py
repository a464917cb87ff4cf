"""The functions of `pointwise.py` for GPUs, in Triton: what is left there of a pass beside the convolutions.

A GPU is short of bytes, not of arithmetic: a map is read and written as seldom as can be. Between two convolutions that
is twice: `_finish` adds what the first one left out and gathers the statistics, `_window` normalises for the second.
Compiled by inductor, the same functions moved 0.9 to 3.6 TB/s of the 4.3 that an H200 copies with, their first form in
Triton mostly 3.2 to 4.0 (LOG.md, 2026-11-26).

Training takes as many: two passes over a map give a norm and its activation, two over map and gradient the gradient.

Shapes: B batch, n pixels of a strip, C channels, P pieces of a map, W columns; strips are [B, r, W, C], channels last.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

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
        _finish[pieces, batch](
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
        _merge[groups, batch](
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
        _halving_window[triton.cdiv(pixels, tile), batch](
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
        _gradient_sums[pieces, batch](*known, parts, pixels, each, *shape, num_warps=8)
        factors, sums = parts.new_empty(2, batch, groups), parts.new_empty(2, batch, channels)
        merged = triton.next_power_of_2(members)
        _merge_gradients[groups, batch](
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
        _gradient[triton.cdiv(pixels, tile), batch](*known, factors, dx, pixels, batch, *shape, num_warps=8)
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
    _weigh[len(scores),](
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
    X, BIAS, RESIDUAL, PARTS, pixels, each, stride, residual_stride,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A piece of `each` pixels: `PiecewiseMoments.add`."""
    piece, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = piece.to(tl.int64) * each
    last = tl.minimum(first + each, pixels)
    c = tl.arange(0, WIDTH)[None, :]
    X += image * stride
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
def _parts(
    PARTS, start, pieces, image, batch, c, known, NUMBERS: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """(addresses of some channels' first numbers in a tile of pieces [P, B, NUMBERS, C], which of them exist)."""
    p = start + tl.arange(0, TILE)[:, None]
    return PARTS + (p * batch + image) * NUMBERS * C + c, (p < pieces) & known


@triton.jit
def _merge(
    PARTS, WAITING, WEIGHT, BIAS, SCALE, SHIFT, MEAN, INVERSE, pieces, eps, batch,
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
        part, here = _parts(PARTS, start, pieces, image, batch, c, known, 3, C, TILE)
        count = tl.load(part, mask=here, other=0.0).to(tl.float64)
        number += count
        total += count * (tl.load(part + C, mask=here, other=0.0).to(tl.float64) + waiting)
    values = tl.sum(number)
    mean = tl.sum(total) / values
    squares = tl.zeros([TILE, WIDTH], tl.float64)
    for start in range(0, pieces, TILE):
        part, here = _parts(PARTS, start, pieces, image, batch, c, known, 3, C, TILE)
        count = tl.load(part, mask=here, other=0.0).to(tl.float64)
        distance = tl.load(part + C, mask=here, other=0.0).to(tl.float64) + waiting - mean
        within = tl.load(part + 2 * C, mask=here, other=0.0).to(tl.float64)
        squares += within + count * distance * distance
    inverse = 1.0 / tl.sqrt(tl.sum(squares) / values + eps)
    scale = tl.load(WEIGHT + c, mask=known, other=0.0).to(tl.float64) * inverse
    shift = tl.load(BIAS + c, mask=known, other=0.0).to(tl.float64) + (waiting - mean) * scale
    tl.store(SCALE + image * C + c, scale.to(tl.float32), mask=known)
    tl.store(SHIFT + image * C + c, shift.to(tl.float32), mask=known)
    group += image * (C // MEMBERS)
    tl.store(MEAN + group, mean.to(tl.float32))
    tl.store(INVERSE + group, inverse.to(tl.float32))


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
def _halving_window(
    OUT, STRIP, BELOW, rows, columns, strip_stride, below_stride,
    HAS_BELOW: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of [rows + 1, columns + 1] pixels: the strip, a row of BELOW or zeros, and a column of zeros."""
    tile, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tile * TILE + tl.arange(0, TILE)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    row, column = i // (columns + 1), i % (columns + 1)
    inside = (column < columns) & (c < C)
    x = tl.load(
        STRIP + image * strip_stride + (row * columns + column) * C + c, mask=inside & (row < rows), other=0.0
    )
    if HAS_BELOW:
        y = tl.load(BELOW + image * below_stride + column * C + c, mask=inside & (row == rows), other=0.0)
        x = tl.where(row < rows, x, y)
    pixels = (rows + 1) * (columns + 1)
    tl.store(OUT + image * pixels * C + i * C + c, x, mask=(i < pixels) & (c < C))


@triton.jit
def _before_silu(DY, X, SCALE, SHIFT, MEAN, image, i, c, here, C: tl.constexpr, MEMBERS: tl.constexpr):
    """(the gradient before SiLU, x - mean, scale) of pixels i."""
    known = c < C
    scale = tl.load(SCALE + image * C + c, mask=known, other=0.0)
    shift = tl.load(SHIFT + image * C + c, mask=known, other=0.0)
    mean = tl.load(MEAN + image * (C // MEMBERS) + c // MEMBERS, mask=known, other=0.0)
    x = tl.load(X + i * C + c, mask=here, other=0.0).to(tl.float32)
    g = tl.load(DY + i * C + c, mask=here, other=0.0).to(tl.float32)
    u = x * scale + shift
    s = tl.sigmoid(u)
    return g * s * (1.0 + u * (1.0 - s)), x - mean, scale


@triton.jit
def _gradient_sums(
    DY, X, SCALE, SHIFT, MEAN, PARTS, pixels, each,
    C: tl.constexpr, MEMBERS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A piece of `each` pixels: [P, B, 2, C] <- the sums of g and of g (x - mean)."""
    piece, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = piece.to(tl.int64) * each
    last = tl.minimum(first + each, pixels)
    c = tl.arange(0, WIDTH)[None, :]
    X += image * pixels * C
    DY += image * pixels * C
    total = tl.zeros([TILE, WIDTH], tl.float32)
    product = tl.zeros([TILE, WIDTH], tl.float32)
    for start in range(first, last, TILE):
        i = start + tl.arange(0, TILE)[:, None]
        here = (i < last) & (c < C)
        g, distance, _ = _before_silu(DY, X, SCALE, SHIFT, MEAN, image, i, c, here, C, MEMBERS)
        total += g
        product += g * distance
    out = PARTS + (piece * tl.num_programs(1) + image) * 2 * C + c
    tl.store(out, tl.sum(total, 0)[None, :], mask=c < C)
    tl.store(out + C, tl.sum(product, 0)[None, :], mask=c < C)


@triton.jit
def _merge_gradients(
    PARTS, WEIGHT, INVERSE, FACTORS, SUMS, pieces, batch, values,
    C: tl.constexpr, MEMBERS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A group of one image, in float64: FACTORS [2, B, groups] <- a and b, SUMS [2, B, C] <- its shares of dbias and
    dweight, as in `Kernels.gradients`."""
    group, image = tl.program_id(0), tl.program_id(1)
    member = tl.arange(0, WIDTH)[None, :]
    c, known = group * MEMBERS + member, member < MEMBERS
    total = tl.zeros([TILE, WIDTH], tl.float64)
    product = tl.zeros([TILE, WIDTH], tl.float64)
    for start in range(0, pieces, TILE):
        part, here = _parts(PARTS, start, pieces, image, batch, c, known, 2, C, TILE)
        total += tl.load(part, mask=here, other=0.0).to(tl.float64)
        product += tl.load(part + C, mask=here, other=0.0).to(tl.float64)
    place = image * (C // MEMBERS) + group
    inverse = tl.load(INVERSE + place).to(tl.float64)
    weight = tl.load(WEIGHT + c, mask=known, other=0.0).to(tl.float64)
    totals, products = tl.sum(total, 0)[None, :], tl.sum(product, 0)[None, :] * inverse
    tl.store(SUMS + image * C + c, totals.to(tl.float32), mask=known)
    tl.store(SUMS + (batch + image) * C + c, products.to(tl.float32), mask=known)
    a = -inverse * tl.sum(weight * totals) / values
    b = -inverse * inverse * tl.sum(weight * products) / values
    tl.store(FACTORS + place, a.to(tl.float32))
    tl.store(FACTORS + batch * (C // MEMBERS) + place, b.to(tl.float32))


@triton.jit
def _gradient(
    DY, X, SCALE, SHIFT, MEAN, FACTORS, DX, pixels, batch,
    C: tl.constexpr, MEMBERS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of pixels: DX <- scale g + a + b (x - mean)."""
    tile, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tile * TILE + tl.arange(0, TILE)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    here = (i < pixels) & (c < C)
    i += image * pixels
    g, distance, scale = _before_silu(DY, X, SCALE, SHIFT, MEAN, image, i, c, here, C, MEMBERS)
    factors = FACTORS + image * (C // MEMBERS) + c // MEMBERS
    a = tl.load(factors, mask=c < C, other=0.0)
    b = tl.load(factors + batch * (C // MEMBERS), mask=c < C, other=0.0)
    tl.store(DX + i * C + c, (scale * g + a + b * distance).to(DX.dtype.element_ty), mask=here)


@triton.jit
def _weigh(SCORES, WEIGHTS, INVERSE, positions, factor, LIMIT: tl.constexpr, TILE: tl.constexpr):
    """A row of weights <- exp(factor scores - reference), INVERSE <- one over their sum; read once, as a rule.

    The reference is the largest score of the first tile, so that the sum is at least 1. A row in which another score
    is more than LIMIT above it, where weights might overflow, is done again with the largest of all.
    """
    row = tl.program_id(0).to(tl.int64) * positions
    i = tl.arange(0, TILE)
    x = tl.load(SCORES + row + i, mask=i < positions, other=float("-inf")) * factor
    reference = tl.max(x, 0)
    largest = reference
    total = tl.zeros([TILE], tl.float32)
    again = 1
    while again == 1:
        total = tl.zeros([TILE], tl.float32)
        for start in range(0, positions, TILE):
            x = tl.load(SCORES + row + start + i, mask=start + i < positions, other=float("-inf")) * factor
            largest = tl.maximum(largest, tl.max(x, 0))
            weights = tl.exp(tl.minimum(x - reference, LIMIT))
            total += weights
            tl.store(
                WEIGHTS + row + start + i, weights.to(WEIGHTS.dtype.element_ty), mask=start + i < positions
            )
        again = (largest - reference > LIMIT).to(tl.int32)
        reference = largest
    tl.store(INVERSE + tl.program_id(0), 1.0 / tl.sum(total, 0))
