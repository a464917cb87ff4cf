"""Image files are opened here, and nowhere else: which formats, what is never opened, what is mended on the way.

A file whose pixels are whole is read, whatever else is broken in it, and a note says what. FIFOs, devices and sockets
are refused without being opened for reading. Formats beyond Pillow's own come with `pip install latentcodec[formats]`.
"""

import importlib
import io
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

import latentcodec.pixels.jpeg as jpeg
import latentcodec.pixels.jxl as jxl
import latentcodec.pixels.png as png
import latentcodec.pixels.webp as webp
from latentcodec.files import open_regular
from latentcodec.pixels.notes import note, pillow_warnings_named

# The formats people keep photographs in. Pillow reads forty more, most of them rare and several with a record of
# security holes (FITS, PSD, EPS ...). A telephone's MPO is opened as the JPEG that it begins with.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


class Plugin(NamedTuple):
    """A format that another package teaches Pillow."""

    format: str
    package: str
    module: str
    register: str | None
    """What is called to teach it; None where the import does."""


HEIF = Plugin("HEIF", "pillow-heif", "pillow_heif", "register_heif_opener")
JPEG_XL = Plugin("JXL", "pillow-jxl-plugin", "pillow_jxl", None)
PLUGINS = {  # suffix of a file -> what reads it
    ".heic": HEIF,
    ".heif": HEIF,
    ".hif": HEIF,
    ".jxl": JPEG_XL,
}
HEIF_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"})
JPEG_XL_STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
GIF_PIXELS_A_BYTE = 4000  # a code of 12 bits repeats fewer than 4096 pixels
TIFF_HEADER_BYTES, TIFF_PLANAR = 8, 2
SMALL_PIXELS = 4_000_000  # a canvas that is worth no question


@contextmanager
def open_image(source: str | Path | bytes, name: str) -> Iterator[Image.Image]:
    """A file, or the bytes of one, of which Pillow has read the header; its pixels are not decoded yet.

    Raises whatever Pillow and the system raise, ValueError for a bomb, and OSError for what is no regular file.
    """
    with (
        io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file,
        _open(file, name) as image,
    ):
        yield image


def refuse_bomb(width: int, height: int) -> None:
    """Pillow only warns between one and two times its limit; a few kilobytes would unfold to 300 MB."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{width * height} pixels ({width} x {height}) are more than PIL.Image.MAX_IMAGE_PIXELS"
            f" = {limit}; set that higher if you trust the file"
        )


@lru_cache
def enable(plugin: Plugin) -> bool:
    """Whether the package is here; if so, Pillow knows its format from now on."""
    try:
        module = importlib.import_module(plugin.module)
    except ImportError:
        return False
    if plugin.register is not None:
        getattr(module, plugin.register)()
    return True


def looks_like_a_picture(start: bytes) -> bool:
    """Whether a file that begins so is of a format that is read here, or would be with its package."""
    signatures = (png.SIGNATURE, jpeg.SIGNATURE, b"GIF8", b"II*\0", b"MM\0*")
    is_pillows = start.startswith(signatures) or webp.is_webp(start) or start[4:12] == b"ftypavif"
    return is_pillows or _plugin(start) is not None


def install_hint(plugin: Plugin) -> str:
    """What makes a file readable that nothing here reads."""
    return f"needs the package {plugin.package}: pip install 'latentcodec[formats]'"


def _open(file: BinaryIO, name: str) -> Image.Image:
    start = file.read(64)
    file.seek(0)
    formats: tuple[str, ...] = FORMATS
    if plugin := _plugin(start):
        if not enable(plugin):
            raise ValueError(f"a {plugin.format} picture {install_hint(plugin)}")
        formats = (plugin.format,)
    if plugin is JPEG_XL:  # whose package decodes a picture before it says how large it is
        refuse_bomb(*jxl.stated_size(file.read()))
        file.seek(0)
    if start.startswith(png.SIGNATURE):
        return _open_png(file, name)
    if start.startswith(jpeg.SIGNATURE):
        return _open_jpeg(file, name)
    if webp.is_webp(start):
        return _open_webp(file, name)
    if start.startswith(b"GIF8"):
        _refuse_empty_canvas(start, file)
    image = _pillow(file, name, formats)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _refuse_missing_parts(image)
    return image


def _pillow(file: BinaryIO, name: str, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    with pillow_warnings_named(name):
        return Image.open(file, formats=formats)


def _plugin(start: bytes) -> Plugin | None:
    """What reads a file that begins so, where Pillow does not."""
    if start.startswith(JPEG_XL_STARTS):
        return JPEG_XL
    brands = {start[i : i + 4] for i in (8, *range(16, 64, 4))}
    if start[4:8] == b"ftyp" and b"avif" not in brands and b"avis" not in brands and brands & HEIF_BRANDS:
        return HEIF
    return None


def _open_png(file: BinaryIO, name: str) -> Image.Image:
    sound = png.sound_png(file.read())
    for text in sound.notes:
        note(name, text)
    image = _pillow(io.BytesIO(sound.content), name)
    if sound.profile:
        image.info["icc_profile"] = sound.profile
    bits, colour = sound.content[24], sound.content[25]
    if "transparency" in image.info and colour == png.GREY:
        # Pillow spreads samples of few bits over 0..255, but not the one that is transparent; only its low bits count.
        largest = 2**bits - 1
        sample = png.transparent_sample(sound.content) & largest
        image.info["transparency"] = sample if bits >= 8 else sample * 255 // largest
    elif "transparency" in image.info and (colour, bits) == (png.RGB, 16):
        _make_transparent(image, sound.content, name)
    return image


def _make_transparent(image: Image.Image, content: bytes, name: str) -> None:
    """Give a 16-bit RGB picture its alpha: Pillow compares the upper bytes of the pixels with a key of 16 bits."""
    key = image.info.pop("transparency")
    alpha = None
    for shift, order in (
        (8, "RGB;16B"),
        (0, "RGB;16L"),
    ):  # taken for little-endian, the lower bytes are the upper
        half = _pillow(io.BytesIO(content), name)
        assert isinstance(half, ImageFile.ImageFile)
        half.tile = [tile._replace(args=order) for tile in half.tile]
        equal = (np.asarray(half) == [value >> shift & 255 for value in key]).all(2)
        alpha = equal if alpha is None else alpha & equal
    assert alpha is not None
    image.putalpha(Image.fromarray(np.where(alpha, 0, 255).astype(np.uint8)))


def _open_webp(file: BinaryIO, name: str) -> Image.Image:
    content, notes = webp.sound_webp(file.read())
    for text in notes:
        note(name, text)
    return _pillow(io.BytesIO(content), name)


def _open_jpeg(file: BinaryIO, name: str) -> Image.Image:
    content = file.read()
    if not jpeg.is_suspicious(content):
        return _without_short_segments(content, name)
    found = jpeg.structure(content)
    if found.scans > jpeg.MOST_SCANS:
        raise ValueError(
            f"more than {jpeg.MOST_SCANS} scans, as no encoder writes; refused for the time they take"
        )
    stripped = content.rstrip(b"\xff")  # which may be the first half of the marker
    if not found.is_ended and found.describes_all_coefficients and _has_all_its_data(stripped, name):
        note(name, "no end marker; its pixels are whole")
        content = stripped + jpeg.END
    return _without_short_segments(content, name)


def _without_short_segments(content: bytes, name: str) -> Image.Image:
    """Pillow refuses a picture for a segment beside it that is cut short, such as one with its resolution."""
    try:
        return _pillow(io.BytesIO(content), name)
    except UnidentifiedImageError:
        kept = jpeg.without_short_segments(content)
        if len(kept) == len(content):
            raise
        image = _pillow(io.BytesIO(kept), name)
    note(name, "segments of applications that are cut short, passed over")
    return image


def _has_all_its_data(content: bytes, name: str) -> bool:
    """Whether more image data would change nothing: then none is missing. Where some is, a decoder fills in."""
    pictures = []
    for tail in jpeg.tails(content):
        try:
            with _pillow(io.BytesIO(content + tail), name) as image:
                pictures.append(image.tobytes())
        except OSError:
            return False
    return all(picture == pictures[0] for picture in pictures)


def _refuse_missing_parts(image: TiffImagePlugin.TiffImageFile) -> None:
    """A TIFF lists where its strips or tiles lie; what is not listed Pillow fills with black, or with the header.

    Of packed ones libtiff says it.
    """
    parts = image.tile or []
    if any(part.codec_name == "libtiff" for part in parts):
        return
    planes = 1
    if image.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION) == TIFF_PLANAR:
        planes = len(image.getbands())
    listed = [part.extents for part in parts if part.extents and part.offset >= TIFF_HEADER_BYTES]
    pixels = sum((right - left) * (bottom - top) for left, top, right, bottom in listed)
    if pixels < planes * math.prod(image.size):
        raise ValueError("truncated: strips or tiles of it are not in the file")


def _refuse_empty_canvas(start: bytes, file: BinaryIO) -> None:
    """A GIF of 40 bytes may have a canvas of 80 million pixels, which nothing in it fills."""
    if len(start) < 10:
        return
    width, height = struct.unpack("<HH", start[6:10])
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if width * height > max(SMALL_PIXELS, GIF_PIXELS_A_BYTE * size):
        raise ValueError(f"a canvas of {width} x {height} pixels, which a GIF of {size} bytes cannot fill")
