"""The gradient of the weight of a 3x3 convolution on CPUs, float32, by Winograd's F(4x4, 3x3) (`weight_gradient.cpp`).

Shapes: B batch, H W rows and columns, C channels, O output channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentcodec.ops.native.build import PRODUCTS_A_VALUE, library, threads_for
from latentcodec.ops.native.winograd import MARGIN

POINTS = 36  # products for each tile and pair of channels
TOGETHER = 24


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    native = library()
    assert native is not None
    x, dy = x.permute(0, 2, 3, 1), dy.permute(0, 2, 3, 1)
    images, rows, columns, channels = x.shape
    outputs = dy.shape[3]
    tiles = images * -(-rows // 4) * -(-columns // 4)
    threads = threads_for(tiles * POINTS * (channels * outputs / PRODUCTS_A_VALUE + channels + outputs))
    together = min(TOGETHER, -(-tiles // threads))
    together = -(-tiles // (threads * -(-tiles // (threads * together))))
    own = POINTS * (channels * outputs + together * (channels + outputs) + 3 * MARGIN) + max(channels, outputs)
    memory, made = torch.empty(threads * own), torch.empty_like(weight)
    native.weight_gradient(
        *(made.data_ptr(), *made.stride()),
        *(dy.data_ptr(), *dy.stride()[:2], x.data_ptr(), *x.stride()[:2]),
        *(*x.shape, outputs, together, memory.data_ptr(), threads),
    )
    return made
