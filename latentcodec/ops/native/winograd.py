"""Winograd's convolutions of float32 maps on CPUs (`winograd.cpp`), with a bias and a residual added.

F(4x4, 3x3) takes a quarter of the multiplications of the direct convolution, F(2x2, 3x3) 4/9; of a map that is doubled
first, 25/144 and 1/4. The products are a batch of matrix products, which torch hands to its BLAS.

Shapes: B batch, r rows of a strip, H W rows and columns, C channels, O output channels, T tiles, P points on an axis.
Maps are [B, H, W, C].
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scheme:
    """Which transforms: `outputs` on each side of a tile, 4 or 2, of a map that is doubled first or not."""

    outputs: int
    doubles: bool = False

    @property
    def products(self) -> int:
        """P^2: multiplications for each tile and pair of channels."""
        return (self.outputs + 2 - self.doubles) ** 2


@dataclass
class Workspace:
    """Memory that convolutions of one pass use again and again: fresh memory costs as much as the transforms."""

    buffers: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, *shape: int) -> Tensor:
        """Float32 memory of `shape`, in which `name` finds what it wrote last, unless it takes another shape."""
        size = torch.Size(shape).numel()
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name] = torch.empty(size)
        return buffer[:size].view(shape)


def transform_weight_(out: Tensor, library: ctypes.CDLL, weight: Tensor, scheme: Scheme) -> Tensor:
    """out [P^2, C, O] <- G w G^T of weight [O, C, 3, 3], which may have any strides."""
    doubles = int(scheme.doubles)
    library.winograd_weight(
        *(scheme.outputs, doubles, out.data_ptr(), weight.data_ptr()),
        *(*weight.shape[:2], *weight.stride()),
        torch.get_num_threads(),
    )
    return out


def convolve(
    library: ctypes.CDLL,
    x: Tensor,
    transformed: Tensor,
    scheme: Scheme,
    bias: Tensor | None,
    residual: Tensor | None,
    workspace: Workspace,
    pads_rows: bool = False,
) -> Tensor:
    """The 3x3 convolution of x [B, H, W, C] with a weight of which `transformed` [P^2, C, O] holds the transform.

    Columns are padded with zeros; rows too where `pads_rows`, else x holds the row above and the row below. ->
    [B, H', W', O] with H' = H or H - 2, and twice H' and W' where the scheme doubles. bias [O], residual as the result.
    """
    images, rows, columns, channels = x.shape
    times = 2 if scheme.doubles else 1
    made = images, (rows if pads_rows else rows - 2) * times, columns * times, transformed.shape[2]
    tiling = -(-made[1] // scheme.outputs), -(-made[2] // scheme.outputs)
    tiles = images * tiling[0] * tiling[1]
    kind, threads = (scheme.outputs, int(scheme.doubles)), torch.get_num_threads()
    tiled = workspace.take("input", scheme.products, tiles, channels)
    products = workspace.take("products", scheme.products, tiles, made[3])
    library.winograd_input(
        *(*kind, tiled.data_ptr(), x.data_ptr(), x.stride(0), x.stride(1)),
        *(*x.shape, *tiling, int(pads_rows), threads),
    )
    torch.bmm(tiled, transformed, out=products)
    y = torch.empty(made)
    library.winograd_output(
        *(*kind, y.data_ptr(), products.data_ptr(), None if bias is None else bias.data_ptr()),
        *((None, 0, 0) if residual is None else (residual.data_ptr(), residual.stride(0), residual.stride(1))),
        *(*made, *tiling, threads),
    )
    return y
