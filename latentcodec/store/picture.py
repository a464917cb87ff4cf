"""From the bytes of a picture to the pixels that are encoded: which size they get, and how they are resized and cut.

Three ways: `--size` scales the shorter side and takes the square centre; `--area` with `--multiple` chooses the bucket
whose aspect ratio is nearest and fills it; without either a picture keeps its size, and its right and bottom edge are
repeated up to a multiple of f, as `LatentCodec.encode` does.

Shapes: C channels, H W pixels, f downsampling factor.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcodec.pixels import UnreadableImage, decode_image, pad_to_multiple
from latentcodec.store.format import Settings, Shape

LONGEST_TO_SHORTEST = 4.0  # of a bucket: what is longer still is cut
LARGEST_SHARE_CUT = (
    64  # times the pixels that are kept; a picture of one line would fill the memory when scaled
)


class Pixels(NamedTuple):
    """A picture that is ready for the encoder."""

    x: Tensor
    """[C, H, W] in [-1, 1], sides multiples of f."""
    size: tuple[int, int]
    """H, W without the repeated edge: what a decoded picture is cropped to."""
    original: tuple[int, int]
    """H, W of the file's picture, upright."""
    crop: tuple[int, int]
    """Top and left of the cut, in pixels of the resized picture."""


def checked_sizes(
    f: int, size: int | None, area: int | None, multiple: int | None
) -> tuple[int | None, int | None, int | None]:
    """`size`, `area` and `multiple` for `Settings`, in pixels: sides of buckets are multiples of 8 f by default.

    Raises ValueError where they contradict each other, or are less than a latent cell.
    """
    if size is not None and area is not None:
        raise ValueError("--size and --area: give one of the two, squares of one size or buckets of one area")
    for name, value in (("size", size), ("area", area), ("multiple", multiple)):
        if value is not None and value < f:
            raise ValueError(f"--{name} {value}: at least {f}, one latent cell")
    if multiple and multiple % f:
        raise ValueError(f"--multiple {multiple}: a multiple of {f} pixels")
    if multiple and area is None:
        raise ValueError("--multiple belongs to --area, the pixels of a bucket")
    return size, area, multiple if multiple or area is None else 8 * f


def target_size(original: tuple[int, int], settings: Settings) -> tuple[int, int]:
    """H, W in pixels that a picture of H, W = `original` is brought to."""
    if settings.size is not None:
        return settings.size, settings.size
    if settings.area is not None:
        assert settings.multiple is not None
        return bucket(original, settings.area, settings.multiple)
    return original


def bucket(original: tuple[int, int], area: int, multiple: int) -> tuple[int, int]:
    """H, W of the bucket whose ratio is the nearest to the picture's, in log scale; of two, the one nearer to `area`.

    A picture that is turned by 90 degrees gets the same bucket, turned.
    """
    longest = math.log(LONGEST_TO_SHORTEST)
    ratio = max(-longest, min(longest, math.log(original[0] / original[1])))

    def far(sides: tuple[int, int]) -> tuple[float, float]:
        height, width = sides
        return round(abs(math.log(height / width) - ratio), 9), abs(math.log(height * width / area))

    return min(_buckets(area, multiple), key=far)


@cache
def _buckets(area: int, multiple: int) -> list[tuple[int, int]]:
    """Every side of whole multiples with the other side that gives about `area` pixels, either way round."""
    most = max(1, round(math.sqrt(area * LONGEST_TO_SHORTEST) / multiple))
    sides = [multiple * number for number in range(1, most + 1)]
    pairs = [(side, multiple * max(1, round(area / side / multiple))) for side in sides]
    return sorted({*pairs, *((width, height) for height, width in pairs)})


def latent_shape(size: tuple[int, int], settings: Settings) -> Shape:
    """c, h, w of a picture of H, W = `size`."""
    f = settings.downsampling_factor
    return settings.latent_channels, -(-size[0] // f), -(-size[1] // f)


def planned_shape(original: tuple[int, int] | None, settings: Settings) -> Shape:
    """c, h, w that a plan has for a picture of H, W = `original`; None where one size is for all."""
    return latent_shape(target_size(original or (0, 0), settings), settings)


def read_pixels(
    source: str | bytes,
    name: str,
    settings: Settings,
    expected: tuple[int, int] | None,
    shape: Shape | None = None,
) -> Pixels:
    """Decodes, resizes and cuts a picture.

    `expected`: H, W that its header gave when the shards were planned; `shape`: of its shard's latents, which says the
    bucket: an earlier version may have planned another than this one would.

    Raises UnreadableImage where the picture is broken, is smaller than `settings.min_side`, or has another size than
    `expected`.
    """
    x = decode_image(source, settings.image_channels, name=name)
    original = (x.shape[-2], x.shape[-1])
    if expected is not None and original != expected:
        raise UnreadableImage(
            f"{name}: {original[0]} x {original[1]} pixels, {expected[0]} x {expected[1]} when the store was planned"
        )
    if min(original) < settings.min_side:
        raise UnreadableImage(
            f"{name}: {original[0]} x {original[1]} pixels, a side below {settings.min_side} (min_side)"
        )
    if shape is None or settings.area is None:
        size = target_size(original, settings)
    else:
        size = shape[1] * settings.downsampling_factor, shape[2] * settings.downsampling_factor
    if max(size[0] / original[0], size[1] / original[1]) ** 2 * x[0].numel() > LARGEST_SHARE_CUT * math.prod(
        size
    ):
        raise UnreadableImage(
            f"{name}: {original[0]} x {original[1]} pixels are too elongated to cut {size} out of"
        )
    x, crop = _fill(x, size)
    return Pixels(pad_to_multiple(x, settings.downsampling_factor), size, original, crop)


def _fill(x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """[C, H, W] scaled until it covers `size`, and its centre of that size; with the cut's top and left."""
    height, width = x.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    if scaled != (height, width):
        x = F.interpolate(x[None], scaled, mode="bicubic", antialias=True)[0].clamp(-1, 1)
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return x[:, top : top + size[0], left : left + size[1]].contiguous(), (top, left)


def mirrored(pixels: Pixels, f: int) -> Tensor:
    """[C, H, W]: the picture mirrored left to right, its edge repeated after that, as it would be encoded by itself."""
    height, width = pixels.size
    return pad_to_multiple(torch.flip(pixels.x[:, :height, :width], [2]), f)
