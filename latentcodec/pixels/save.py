"""Pixels become files of 8 bits.

Shapes: C channels, H W pixels.
"""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from latentcodec.files import write_whole
from latentcodec.pixels.tensors import to_uint8

WRITERS: dict[str, tuple[str, dict[str, object]]] = {  # suffix -> Pillow's name of the format, its options
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True, "exact": True}),  # exact keeps the colour of invisible pixels
}


def save_image(x: Tensor, path: str | Path) -> None:
    """Writes [1, C, H, W] or [C, H, W] in [-1, 1], C 1 (grey), 3 (RGB) or 4 (RGB, alpha), as `encode_image` does.

    Missing folders are made. The file appears whole or not at all: a killed process leaves an earlier file as
    it was, and at worst a hidden `.tmp` beside it. Raises `OSError` where the disk refuses, and `ValueError`
    as `encode_image`.
    """
    write_whole(Path(path), encode_image(x, Path(path)), durable=False)


def encode_image(x: Tensor, path: Path) -> bytes:
    """The bytes that a file of this name is to hold: [1, C, H, W] or [C, H, W] in [-1, 1], clamped, at 8 bits.

    uint8 tensors are 0..255 already and are written as they are. PNG and WebP keep every 8-bit value, JPEG has
    quality 95 without chroma subsampling. Raises `ValueError` naming the path for another suffix, shape or integer
    type, or pixels that are not finite.
    """
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"{path}: pictures are written as {', '.join(WRITERS)}, not as {path.suffix!r}")
    file_format, options = WRITERS[path.suffix.lower()]
    picture = x[0] if x.ndim == 4 and len(x) == 1 else x
    if picture.ndim != 3 or len(picture) not in (1, 3, 4) or picture.numel() == 0:
        raise ValueError(f"{path}: a picture is [1, C, H, W] or [C, H, W], C 1, 3 or 4, not {list(x.shape)}")
    if not (picture.is_floating_point() or picture.dtype == torch.uint8):
        raise ValueError(
            f"{path}: a picture is floats in [-1, 1] or uint8 in 0..255, not {picture.dtype}; convert it first"
        )
    if not torch.isfinite(picture).all():
        raise ValueError(f"{path}: not written, for the picture holds NaN or infinite pixels")
    levels = picture if picture.dtype == torch.uint8 else to_uint8(picture)
    pixels = levels.cpu().permute(1, 2, 0).numpy()  # [H, W, C]
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    encoded = io.BytesIO()
    try:
        image.save(encoded, file_format, **options)
    except (OSError, ValueError) as error:  # JPEG has no alpha; JPEG and WebP have a largest size
        raise ValueError(f"{path}: the picture cannot be written as {file_format} ({error})") from error
    return encoded.getvalue()
