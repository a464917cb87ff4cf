"""Pixels as tensors: 8 bits and floats, padding to whole latent cells and back, pictures side by side.

Shapes: C channels, H W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SEPARATOR_PIXELS = 2  # between the pictures of a grid


def to_uint8(x: Tensor) -> Tensor:
    """Floats in [-1, 1] of any shape to 0..255: round(127.5 (x + 1)), clamped; undoes `from_uint8`.

    Raises `ValueError` for integers, which cannot be pixels in [-1, 1]. NaN has no level: `save_image` and the metrics
    refuse it.
    """
    if not x.is_floating_point():
        raise ValueError(f"pixels in [-1, 1] are floats, not {x.dtype}; uint8 pixels need no conversion")
    return (x.float() + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(u: Tensor) -> Tensor:
    """0..255 of any shape to float32 in [-1, 1]: u / 127.5 - 1."""
    return u.float().div_(127.5).sub_(1) if u.dtype != torch.float32 else u / 127.5 - 1


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """[..., H, W] -> [..., ceil(H / m) m, ceil(W / m) m], m = `multiple`: last row and column repeated.

    What already has such a size is returned as it is, not copied.
    """
    height, width = x.shape[-2:]
    if rows := -height % multiple:
        x = torch.cat([x, x[..., -1:, :].expand(*x.shape[:-2], rows, width)], dim=-2)
    if columns := -width % multiple:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], columns)], dim=-1)
    return x


def crop(y: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., H', W'] -> [..., H, W], a view of the upper left corner; undoes `pad_to_multiple`.

    Raises `ValueError` where (H, W) = `size` is not inside the picture.
    """
    height, width = size
    full_height, full_width = y.shape[-2:]
    if not (0 < height <= full_height and 0 < width <= full_width):
        raise ValueError(f"{height} x {width} pixels cannot be cut out of {full_height} x {full_width}")
    return y[..., :height, :width]


def crop_middle(x: Tensor, side: int) -> Tensor:
    """[..., H, W] -> a view of its middle, at most `side` pixels a side."""
    top, left = (max(length - side, 0) // 2 for length in x.shape[-2:])
    return x[..., top : top + side, left : left + side]


def image_grid(images: Sequence[Tensor], columns: int) -> Tensor:
    """Equal sized [C, H, W] in [-1, 1], row by row, as one [C, H', W'] with white lines of 2 pixels between.

    Places left over in the last row stay white. Raises `ValueError` for no image, no column, unequal shapes.
    """
    if not images or columns < 1:
        raise ValueError(f"a grid of {len(images)} images in {columns} columns: both must be at least one")
    if len(shapes := {tuple(image.shape) for image in images}) > 1:
        raise ValueError(f"the images of a grid have one shape, not {sorted(shapes)}")
    channels, height, width = images[0].shape
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    step_y, step_x = height + SEPARATOR_PIXELS, width + SEPARATOR_PIXELS
    size = (channels, rows * step_y - SEPARATOR_PIXELS, columns * step_x - SEPARATOR_PIXELS)
    grid = images[0].new_ones(size)  # 1 is white
    for i, image in enumerate(images):
        top, left = i // columns * step_y, i % columns * step_x
        grid[:, top : top + height, left : left + width] = image
    return grid
