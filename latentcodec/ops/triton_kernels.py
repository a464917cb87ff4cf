"""The programs of `triton_pointwise.py`, as each runs on a GPU beside many of itself.

Capital names are addresses or constants of the compiler, small ones are values. `WIDTH` and `TILE` are powers of two:
what a program holds of the channels and of the pixels, or pieces, at a time.

Shapes: B batch, C channels, P pieces of a map; strips are [B, r, W, C], channels last.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish(
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
def merge(
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
def window(
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
def halving_window(
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
def gradient_sums(
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
def merge_gradients(
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
def gradient(
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
def weigh(SCORES, WEIGHTS, INVERSE, positions, factor, LIMIT: tl.constexpr, TILE: tl.constexpr):
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
