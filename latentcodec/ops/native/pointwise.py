"""The functions of `ops/pointwise.py` for float32 and bfloat16 on CPUs, in native code (`pointwise.cpp`).

Activations other than SiLU and dtypes other than these two are left to the functions in torch.

Shapes: B batch, r rows and n pixels of a strip, W columns, C channels; strips are [B, r, W, C].
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcodec.ops.native.build import floats, threads_for
from latentcodec.ops.pointwise import RMS, Activation, Kernels, Moments, Norm

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What the native functions take, as they are told of it."""


class NativeMoments(Moments):
    """Mean and variance of every channel of a map, gathered strip by strip; sums within a row are float32."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__()
        self.library = library

    def add(self, strip: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        if strip.dtype not in DTYPES:
            return super().add(strip, bias, residual)
        if self.known:
            return None
        strip = with_dense_rows(strip)
        images, rows, columns, channels = strip.shape
        is_first = not self.pixels
        if is_first:
            self.pivot = floats(images, 1, 1, channels)
            self.sums = torch.empty(2, images, channels, dtype=torch.float64, device="cpu")
        self.library.add_moments(
            *(DTYPES[strip.dtype], is_first),
            self.sums.data_ptr(),
            self.pivot.data_ptr(),
            *place(strip),
            *(images, rows, columns, channels),
            threads_for(strip.numel()),
        )
        self.pixels += rows * columns
        return None

    def norm(
        self, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: Activation | None
    ) -> Norm:
        self.known = True
        images, channels = self.pivot.shape[0], self.pivot.shape[3]
        weight, bias = (value.detach().float().contiguous() for value in (weight, bias))
        scale, shift = floats(2, images, 1, channels)
        shape = 2, images, groups, 1
        self.mean, self.inverse = torch.empty(shape, dtype=torch.float64, device="cpu")
        self.library.norm(
            *(value.data_ptr() for value in (scale, shift, self.mean, self.inverse)),
            *(value.data_ptr() for value in (self.sums, self.pivot, weight, bias)),
            *(images, channels, groups, self.pixels, eps),
        )
        return Norm(scale, shift, activation)


class NativeKernels(Kernels):
    """The work between two convolutions on a CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def moments(self, inner: bool = False) -> Moments:
        return NativeMoments(self.library)

    def normalise_(self, out: Tensor, x: Tensor, norm: Norm | RMS) -> None:
        if not _is_native(x, norm) or out.dtype != x.dtype or not out.is_contiguous():
            return super().normalise_(out, x, norm)
        x, factors = x.contiguous(), _factors(norm)
        self.library.normalise(
            DTYPES[x.dtype],
            *(out.data_ptr(), x.data_ptr()),
            *x.shape,
            *(None if factor is None else factor.data_ptr() for factor in factors),
            *(norm.activation is not None, threads_for(x.numel())),
        )
        return None

    def window_(
        self, out: Tensor, above: Tensor | None, strip: Tensor, below: Tensor | None, norm: Norm | RMS | None
    ) -> None:
        if not _is_native(strip, norm) or out.dtype != strip.dtype:
            return super().window_(out, above, strip, below, norm)
        strip = with_dense_rows(strip)
        above = None if above is None else with_dense_rows(above[:, -1:])
        below = None if below is None else with_dense_rows(below[:, :1])
        factors = _factors(norm)
        self.library.window(
            DTYPES[strip.dtype],
            out.data_ptr(),
            *((None, 0) if above is None else place(above)[:2]),
            *place(strip),
            *((None, 0) if below is None else place(below)[:2]),
            *strip.shape,
            *(None if factor is None else factor.data_ptr() for factor in factors),
            *(norm is not None and norm.activation is not None, threads_for(strip.numel())),
        )
        return None

    def halving_window_(self, out: Tensor, strip: Tensor, below: Tensor | None) -> None:
        strip = with_dense_rows(strip)
        below = None if below is None else with_dense_rows(below[:, :1])
        images, rows, columns, channels = strip.shape
        size = strip.itemsize
        self.library.halving_window(
            *(channels * size, out.data_ptr()),
            *(strip.data_ptr(), strip.stride(0) * size, strip.stride(1) * size),
            *((None, 0) if below is None else (below.data_ptr(), below.stride(0) * size)),
            *(images, rows, columns * channels * size, threads_for(strip.numel())),
        )

    def gradient_sums(self, dy: Tensor, x: Tensor, *known: Tensor) -> Tensor:
        """[2, B, 1, C] float64."""
        if x.dtype not in DTYPES or dy.dtype != x.dtype:
            return super().gradient_sums(dy, x, *known)
        dy, x = dy.contiguous(), x.contiguous()
        images, rows, columns, channels = x.shape
        sums = torch.zeros(2, images, 1, channels, dtype=torch.float64, device="cpu")
        self.library.gradient_sums(
            DTYPES[x.dtype],
            *(value.data_ptr() for value in (sums, dy, x)),
            *(images, rows * columns, channels),
            *(value.data_ptr() for value in known),
            threads_for(x.numel()),
        )
        return sums

    def gradient(self, dy: Tensor, x: Tensor, *known: Tensor) -> Tensor:
        if x.dtype not in DTYPES or dy.dtype != x.dtype:
            return super().gradient(dy, x, *known)
        dy, x, together = dy.contiguous(), x.contiguous(), torch.stack(known)
        dx, (images, rows, columns, channels) = torch.empty_like(x), x.shape
        self.library.gradient(
            DTYPES[x.dtype],
            *(value.data_ptr() for value in (dx, dy, x)),
            *(images, rows * columns, channels),
            together.data_ptr(),
            threads_for(x.numel()),
        )
        return dx


def _is_native(x: Tensor, norm: Norm | RMS | None) -> bool:
    return x.dtype in DTYPES and (norm is None or norm.activation in (None, F.silu))


def _factors(norm: Norm | RMS | None) -> tuple[Tensor | None, Tensor | None]:
    """What the native functions take as scale and shift; a gain is a scale without a shift."""
    if norm is None:
        return None, None
    return (norm.gain.float().contiguous(), None) if isinstance(norm, RMS) else (norm.scale, norm.shift)


def with_dense_rows(strip: Tensor) -> Tensor:
    """`strip`, copied unless the pixels of a row follow one another."""
    channels = strip.shape[3]
    is_dense = (channels == 1 or strip.stride(3) == 1) and (
        strip.shape[2] == 1 or strip.stride(2) == channels
    )
    return strip if is_dense else strip.contiguous()


def place(strip: Tensor) -> tuple[int, int, int]:
    """Where a strip is, and how many values its images and its rows lie apart."""
    return strip.data_ptr(), strip.stride(0), strip.stride(1)
