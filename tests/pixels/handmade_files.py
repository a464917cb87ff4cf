"""A smooth picture, and PNG files of it written chunk by chunk after the specification, to break them anywhere."""

import struct
import zlib

import numpy as np
from PIL import Image


def picture(size=(48, 32), mode="RGB"):
    """Smooth colours, so that JPEG keeps them."""
    random_ = np.random.default_rng(0)
    small = Image.fromarray(random_.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def chunk(kind, data, broken=False):
    checksum = zlib.crc32(kind + data) ^ int(broken)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(*extra, after=b"", end=True, body=None):
    """A PNG of `picture()` with chunks between its header and its pixels."""
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(picture()))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 48, 32, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows)) if body is None else body
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + after + chunk(b"IEND", b"") * end
