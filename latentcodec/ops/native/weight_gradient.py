"""The gradients of a 3x3 convolution's weight and bias on CPUs, float32, by Winograd's F(4x4, 3x3), read backwards.

The native code is in `weight_gradient.cpp`. It takes a sixth to two thirds of the time of oneDNN's direct sum, and
its error is smaller, since fewer values are added up one after another.

Shapes: B batch, H W rows and columns, C channels, O output channels. Maps come as [B, C, H, W] in channels_last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentcodec.ops.native.build import PRODUCTS_A_VALUE, floats, library, threads_for
from latentcodec.ops.native.convolution import PANEL
from latentcodec.ops.native.pointwise import place, with_dense_rows
from latentcodec.ops.native.winograd import MARGIN, PLAIN, Scheme

TOGETHER = 24  # tiles that a thread transforms before it multiplies them: anything from 12 to 64 is as fast
MOST_BYTES = 1 << 29  # of the sums of all threads
FEWEST_TILES = 8  # of a thread: for fewer, sums are cleared and transformed for too little
CACHED_WEIGHT = (
    1 << 13
)  # values of a weight, for each of which a thread needs one tile more: its sums leave the cache


def suits(weight: Tensor, shape: torch.Size, scheme: Scheme = PLAIN) -> bool:
    """Whether the gradient of a weight [O, C, 3, 3] is faster here than in torch, for a result of this shape."""
    outputs, channels = weight.shape[:2]
    if library() is None or outputs % PANEL or channels % PANEL:
        return False
    tiles = _tiles(shape)
    threads = _threads(tiles, channels, outputs, scheme)
    fewest = max(FEWEST_TILES, channels * outputs // CACHED_WEIGHT)
    return tiles >= threads * fewest and 4 * threads * scheme.products * channels * outputs <= MOST_BYTES


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, scheme: Scheme = PLAIN) -> tuple[Tensor, Tensor]:
    """Of the convolution of x [B, C, H', W'], zeros around it, with a weight [O, C, 3, 3], for dy [B, O, H, W].

    -> that of the weight, in its own order in memory, and that of a bias [O]. The scheme may double x first.
    """
    native = library()
    assert native is not None
    tiles, (outputs, channels) = _tiles(dy.shape), weight.shape[:2]
    x, dy = with_dense_rows(x.permute(0, 2, 3, 1)), with_dense_rows(dy.permute(0, 2, 3, 1))
    threads = _threads(tiles, channels, outputs, scheme)
    together = min(TOGETHER, -(-tiles // threads))
    plane = channels * outputs + together * (channels + outputs) + 3 * MARGIN
    memory = floats(threads * (scheme.products * plane + max(channels, outputs)))
    dweight, dbias = torch.empty_like(weight), floats(outputs)
    native.weight_gradient(
        *(int(scheme.doubles), dweight.data_ptr(), *dweight.stride(), dbias.data_ptr()),
        *(*place(dy), *place(x), *x.shape, outputs),
        *(together, memory.data_ptr(), threads),
    )
    return dweight, dbias


def _tiles(shape: torch.Size) -> int:
    """Of a result [B, O, H, W]."""
    return shape[0] * -(-shape[2] // 4) * -(-shape[3] // 4)


def _threads(tiles: int, channels: int, outputs: int, scheme: Scheme) -> int:
    """How many of torch's threads are worth waking."""
    return threads_for(tiles * scheme.products * (channels * outputs / PRODUCTS_A_VALUE + channels + outputs))
