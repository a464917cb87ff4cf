"""JPEG, WebP and AVIF with no more bytes than a latent: a scale to see a codec against, not a race.

Shapes: C channels, H W pixels.
"""

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image, features
from torch import Tensor

from latentcodec.pixels import decode_image, to_uint8

FORMATS: dict[str, dict[str, Any]] = {"JPEG": {"optimize": True}, "WebP": {"method": 4}, "AVIF": {"speed": 8}}
HONEST = (
    "A latent is counted as 8 bits a number, as a store keeps it, without an entropy coder, and the codec was trained "
    "to be generated, not to be small; JPEG, WebP and AVIF are made to be small, and for the eye rather than for PSNR."
)


@dataclass(frozen=True)
class Coded:
    """One image through an image format."""

    image: Tensor
    """[1, C, H, W] in [-1, 1], decoded again."""
    size: int
    """Bytes of the file."""
    quality: int
    """1 to 95; 1 where even that does not fit."""


def available() -> list[str]:
    """The formats that this machine's Pillow can write."""
    return ["JPEG", *(name for name in ("WebP", "AVIF") if features.check(name.lower()))]


def code(x: Tensor, form: str, most_bytes: int) -> Coded:
    """x [1, C, H, W] in [-1, 1], C 1 or 3, in the best quality of a format of `FORMATS` that needs no more bytes.

    Found by bisection over the quality from 1 to 95. Where no quality fits it is 1, and `size` tells.
    """
    image = Image.fromarray(to_uint8(x[0]).permute(1, 2, 0).squeeze(-1).cpu().numpy())
    best, best_quality = _file(image, form, 1), 1
    low, high = 2, 95
    while low <= high:
        quality = (low + high) // 2
        content = _file(image, form, quality)
        if len(content) <= most_bytes:
            best, best_quality, low = content, quality, quality + 1
        else:
            high = quality - 1
    return Coded(decode_image(best, x.shape[1], name=form)[None], len(best), best_quality)


def _file(image: Image.Image, form: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, quality=quality, **FORMATS[form])
    return buffer.getvalue()
