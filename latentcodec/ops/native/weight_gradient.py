"""The gradients of a 3x3 convolution's weight and bias on CPUs, float32, by Winograd's F(4x4, 3x3), read backwards.

The native code is in `weight_gradient.cpp`. It is 2 to 6 times as fast as oneDNN's direct sum, and its error is smaller,
since fewer values are added up one after another.

Shapes: B batch, H W rows and columns, C channels, O output channels. Maps come as [B, C, H, W] in channels_last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentcodec.ops.native.build import PRODUCTS_A_VALUE, library, threads_for
from latentcodec.ops.native.convolution import PANEL
from latentcodec.ops.native.pointwise import place, with_dense_rows
from latentcodec.ops.native.winograd import MARGIN

OUTPUTS = 4  # on each side of a tile
POINTS = 36  # products for each tile and pair of channels
TOGETHER = 24  # tiles that a thread transforms before it multiplies them: anything from 12 to 64 is as fast
MOST_BYTES = 1 << 29  # of the sums of all threads
FEWEST_TILES = 8  # of a thread: for fewer, sums are cleared and transformed for too little
CACHED_WEIGHT = 1 << 13  # values of a weight, for each of which a thread needs one tile more: its sums leave the cache


def suits(weight: Tensor, images: int, rows: int, columns: int) -> bool:
    """Whether the gradient of a weight [O, C, 3, 3] is faster here than in torch, for maps of this size."""
    outputs, channels = weight.shape[:2]
    if library() is None or outputs % PANEL or channels % PANEL:
        return False
    tiles = _tiles(images, rows, columns)
    threads = _threads(tiles, channels, outputs)
    fewest = max(FEWEST_TILES, channels * outputs // CACHED_WEIGHT)
    return tiles >= threads * fewest and 4 * threads * POINTS * channels * outputs <= MOST_BYTES


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of the convolution of x [B, C, H, W], zeros around it, with a weight [O, C, 3, 3], for dy [B, O, H, W] -> that
    of the weight, in the weight's order in memory, and that of a bias [O]."""
    native = library()
    assert native is not None
    x, dy = with_dense_rows(x.permute(0, 2, 3, 1)), with_dense_rows(dy.permute(0, 2, 3, 1))
    channels, outputs = x.shape[3], dy.shape[3]
    tiles = _tiles(*x.shape[:3])
    threads = _threads(tiles, channels, outputs)
    together = min(TOGETHER, -(-tiles // threads))
    own = POINTS * (channels * outputs + together * (channels + outputs) + 3 * MARGIN) + max(channels, outputs)
    memory, dweight, dbias = torch.empty(threads * own), torch.empty_like(weight), torch.empty(outputs)
    native.weight_gradient(
        *(dweight.data_ptr(), *dweight.stride(), dbias.data_ptr()),
        *(*place(dy), *place(x), *x.shape, outputs),
        *(together, memory.data_ptr(), threads),
    )
    return dweight, dbias


def _tiles(images: int, rows: int, columns: int) -> int:
    return images * -(-rows // OUTPUTS) * -(-columns // OUTPUTS)


def _threads(tiles: int, channels: int, outputs: int) -> int:
    """How many of torch's threads are worth waking."""
    return threads_for(tiles * POINTS * (channels * outputs / PRODUCTS_A_VALUE + channels + outputs))
