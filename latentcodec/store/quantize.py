"""Latents as they are stored, and back: float32, float16, bfloat16, float8 and int8.

int8 has a scale for each picture and channel: q = round(z / s), s = max |z| / 127 over the channel's cells. That keeps
a decoded picture within a few hundredths of a dB; one scale for the whole picture loses ten times as much, since the
channels of a latent differ in range.

Shapes: B batch, c latent channels, h w latent cells, n rows of a shard.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TORCH = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
}
_BITS = {torch.float8_e4m3fn: torch.uint8}  # torch indexes and joins bytes, but not float8
INT8_LEVELS = 127
FLOAT8_LARGEST = 448.0  # e4m3 has no infinity: larger values become NaN without a bound


class Quantized(NamedTuple):
    """A batch of latents as they are stored."""

    values: Tensor
    """[B, c, h, w] in the stored dtype."""
    scale: Tensor | None
    """[B, c] float32, for int8."""

    def rows(self, chosen: Tensor | slice) -> Quantized:
        """Some rows, by number, slice or mask."""
        bits = self.values.view(_BITS.get(self.values.dtype, self.values.dtype))[chosen]
        return Quantized(bits.view(self.values.dtype), None if self.scale is None else self.scale[chosen])


def quantize(z: Tensor, dtype: str) -> Quantized:
    """[B, c, h, w] float32 -> what is stored. Raises ValueError for an unknown `dtype`.

    Values beyond the range of float16 become infinite and those beyond float8's 448 are clamped; the caller refuses
    what is not finite.
    """
    if dtype not in TORCH:
        raise ValueError(f"dtype {dtype!r}: latents are stored as {', '.join(TORCH)}")
    z = z.float()
    if dtype == "int8":
        scale = z.abs().amax((2, 3)) / INT8_LEVELS  # [B, c]
        steps = z / torch.where(scale > 0, scale, 1.0)[:, :, None, None]  # a channel of zeros stays one
        return Quantized(steps.round().clamp(-INT8_LEVELS, INT8_LEVELS).to(torch.int8), scale)
    if dtype == "float8":
        z = z.clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST)
    return Quantized(z.to(TORCH[dtype]), None)


def joined(parts: list[Quantized]) -> Quantized:
    """Several batches as one."""
    dtype = parts[0].values.dtype
    values = torch.cat([part.values.view(_BITS.get(dtype, dtype)) for part in parts]).view(dtype)
    scales = [part.scale for part in parts if part.scale is not None]
    return Quantized(values, torch.cat(scales) if scales else None)


def dequantize(stored: Quantized) -> Tensor:
    """What `store[i]` gives: floats of 16 or 32 bits as they are stored, float32 for int8 and float8."""
    if stored.scale is not None:
        return stored.values.float() * stored.scale[..., None, None]
    return stored.values.float() if stored.values.dtype == torch.float8_e4m3fn else stored.values


def as_bytes(values: Tensor) -> np.ndarray:
    """[n, ...] of any dtype -> [n, bytes of a row] uint8, a view where that is possible."""
    return values.contiguous().flatten(1).view(torch.uint8).numpy()
