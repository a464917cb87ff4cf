"""Image files and PIL images become pixels: float32 [C, H, W] in [-1, 1], upright, in the colours of sRGB.

Shapes: C channels, H W pixels.
"""

from pathlib import Path

import torch
from PIL import ExifTags, Image, TiffImagePlugin
from torch import Tensor

from latentcodec.pixels.colour import Colours, with_channels
from latentcodec.pixels.containers import open_image, refuse_bomb
from latentcodec.pixels.notes import UnreadableImage, note, pillow_warnings_named, reason

TURNS = {  # EXIF orientation, as stored -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = frozenset(TURNS[orientation] for orientation in (5, 6, 7, 8))  # height and width change places
BAND_PIXELS = 2_000_000  # converted at a time: what lies between a file and its floats is small beside them


def load_image(path: str | Path, channels: int = 3) -> Tensor:
    """An image file as [1, C, H, W] float32 in [-1, 1], read as `decode_image` reads it."""
    return decode_image(path, channels)[None]


def decode_image(
    source: str | Path | bytes | Image.Image, channels: int = 3, name: str | None = None
) -> Tensor:
    """A file, the bytes of a file or a PIL image as [C, H, W] float32 in [-1, 1].

    * Formats: JPEG (and MPO), PNG, WebP, GIF, BMP, TIFF and AVIF, with the extra `formats` HEIC and JPEG XL; of an
      animation or a many-page file the first frame, of a PIL image the frame it stands at.
    * The EXIF orientation is applied. An ICC profile is followed to sRGB, also for CMYK; CMYK without one is
      converted as Pillow does it. What is broken in a file and does not touch its pixels (a profile, EXIF data, a text,
      the end marker) is passed over with an `ImageWarning` that names the file, or noted (`collect_notes`).
    * 16-bit grey keeps its 65536 levels (12-bit TIFF its 4096); the curve of a grey profile is known at 8
      bits only. 16-bit colour, and 16-bit grey with an alpha channel, are opened by Pillow as 8 bit: their
      low bytes are lost.
    * `channels` 1 or 3: transparent pixels are composited on white; 1 is the luma of ITU-R BT.601, unrounded.
      `channels` 4: RGB as stored and alpha, opaque (1) where the picture has none.

    At its peak it holds the result and some 8 bytes a pixel more. Raises `UnreadableImage` naming `name` (by default
    the path) and the reason, whatever is wrong: no such file, a FIFO or device, not an image, truncated, more pixels
    than `PIL.Image.MAX_IMAGE_PIXELS` as the caller has set it, more scans than an encoder writes, or a mode without a
    known range (F and I, floats and 32-bit integers) or conversion (LAB). Raises `ValueError` for other `channels`.
    """
    if channels not in (1, 3, 4):
        raise ValueError(f"channels={channels}: pictures are read as 1 (grey), 3 (RGB) or 4 (RGB and alpha)")
    name = name or _name(source)
    try:
        if isinstance(source, Image.Image):
            return _read(source, channels, name)
        with open_image(source, name) as image:
            refuse_bomb(*image.size)
            return _read(image, channels, name)
    except Exception as error:  # Pillow's decoders raise nearly every type; one bad file must not end a run
        raise UnreadableImage(f"{name}: {reason(error)}") from error


def image_size(source: str | Path | bytes, name: str | None = None) -> tuple[int, int]:
    """Height and width in pixels that `decode_image` gives, from the header of a file or of its bytes alone.

    Raises `UnreadableImage` where there is no header; what follows a sound one may still be broken.
    """
    name = name or _name(source)
    try:
        with open_image(source, name) as image:
            width, height = image.size
            if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose size Pillow has turned already
                return height, width
            return (width, height) if _turn(image, name) in SIDEWAYS else (height, width)
    except Exception as error:  # as in `decode_image`
        raise UnreadableImage(f"{name}: {reason(error)}") from error


def _name(source: object) -> str:
    """What messages call a source that came without a name."""
    if isinstance(source, str | Path):
        return str(source)
    return str(getattr(source, "filename", "")) or f"image ({type(source).__name__})"


def _read(image: Image.Image, channels: int, name: str) -> Tensor:
    """An open picture as [C, H, W] in [-1, 1]."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose warnings come only now
        with pillow_warnings_named(name):
            image.load()
    else:
        image.load()  # before its EXIF is asked for: loading a TIFF turns it, and says so there
    colours = Colours(image, name)
    upright = _upright(image, name)
    width, height = upright.size
    rows = max(1, BAND_PIXELS // max(1, width))
    if rows >= height:
        return with_channels(*colours.of(upright), channels)
    pixels = torch.empty(channels, height, width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[:, top:bottom] = with_channels(*colours.of(upright.crop((0, top, width, bottom))), channels)
    return pixels


def _upright(image: Image.Image, name: str) -> Image.Image:
    """The picture turned as its EXIF orientation says.

    Not by `ImageOps.exif_transpose`, which writes the EXIF block anew and fails on a damaged entry that has
    nothing to do with the orientation.
    """
    turn = _turn(image, name)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image, name: str) -> Image.Transpose | None:
    """What makes the picture upright, if anything need be done."""
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return None  # the decoder has followed the orientation that stands beside the pixels; a packed JPEG has EXIF
    try:
        with pillow_warnings_named(name):
            return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # a damaged block raises nearly every type; the pixels are sound
        note(name, f"broken EXIF data ignored ({reason(error)})")
        return None
