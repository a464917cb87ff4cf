"""Random pictures for the tests, their bytes in a format, and the pixels that they must become."""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LEVEL = 2 / 255  # one 8-bit step in [-1, 1]
RAMP16 = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def noise(mode="RGB", size=(7, 5), seed=0):
    """A picture of random pixels, width 7 and height 5, so that every turn shows."""
    bands = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    return Image.merge(mode, [Image.fromarray(np.ascontiguousarray(pixels[..., i])) for i in range(bands)])


def encoded(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def png(header, rows, *chunks):
    """A PNG from its header and its unfiltered rows, with more chunks before the picture."""
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def pixels_of(image):
    """[C, H, W] in [-1, 1] of an 8-bit L or RGB image: the definition, in float64."""
    values = np.asarray(image).astype(np.float64)
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    return torch.from_numpy(values / 255 * 2 - 1).float()


def close(actual, expected, levels=1e-4):
    """Within so many 8-bit steps, everywhere."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= levels * LEVEL


def swapped_primaries():
    """sRGB whose red is called green and whose green is called red."""
    return SRGB.replace(b"rXYZ", b"tmp.").replace(b"gXYZ", b"rXYZ").replace(b"tmp.", b"gXYZ")
