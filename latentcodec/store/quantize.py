"""Latents as they are stored, and back: float32, float16, bfloat16, float8 and int8.

int8 has a step and a middle for each picture and channel: q = round((z - middle) / step), step = (max z - min z) / 254
over the channel's cells. That keeps a decoded picture within a few hundredths of a dB; numbers for the whole picture
lose ten times as much, since the channels of a latent differ in range, and a step around zero a sixth more.

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
INT8_LARGEST = 127
FLOAT8_LARGEST = 448.0  # e4m3 has no infinity: larger values become NaN without a bound


class Quantized(NamedTuple):
    """A batch of latents as they are stored."""

    values: Tensor
    """[B, c, h, w] in the stored dtype."""
    scale: Tensor | None
    """[B, 2, c] float32 for int8: step and middle of each channel."""

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
        low, high = z.amin((2, 3)), z.amax((2, 3))  # [B, c]
        step, middle = (high - low) / (2 * INT8_LARGEST), (high + low) / 2
        safe = torch.where(step > 0, step, 1.0)  # of a channel that is constant
        levels = ((z - middle[:, :, None, None]) / safe[:, :, None, None]).round()
        values = levels.clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8)
        return Quantized(values, torch.stack([step, middle], 1))
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
        step, middle = stored.scale[..., None, None].unbind(1)
        return stored.values.float() * step + middle
    return stored.values.float() if stored.values.dtype == torch.float8_e4m3fn else stored.values


def as_bytes(values: Tensor) -> np.ndarray:
    """[n, ...] of any dtype -> [n, bytes of a row] uint8, a view where that is possible."""
    return values.contiguous().flatten(1).view(torch.uint8).numpy()
