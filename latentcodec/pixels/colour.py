"""The colours of an open picture: ICC profiles to sRGB, transparency, 16-bit grey; in [-1, 1].

Shapes: C channels, H W pixels.
"""

import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, TiffImagePlugin
from torch import Tensor

from latentcodec.pixels.notes import note, reason
from latentcodec.pixels.tensors import from_uint8

GREY_MODES = frozenset({"1", "L", "LA", "La"})
COLOUR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"})
GREY16_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
PROFILE_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # ICC colour space -> mode of its pictures
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights of Pillow's own mode "L"
RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None])  # every 8-bit grey once


class Colours:
    """What gives the colours of a picture, band of rows by band; its profile is looked at once."""

    def __init__(self, image: Image.Image, name: str) -> None:
        """`image`: as it was opened, loaded; raises ValueError for a mode without a known range or conversion."""
        if image.mode not in GREY_MODES | COLOUR_MODES | GREY16_MODES:
            raise ValueError(f"mode {image.mode!r} is not read; convert it to L, I;16, RGB or RGBA first")
        self._is_16_bit = image.mode in GREY16_MODES
        self._mode = (
            "CMYK" if image.mode == "CMYK" else "L" if image.mode in GREY_MODES | GREY16_MODES else "RGB"
        )
        self._profile = _usable_profile(image.info.get("icc_profile"), self._mode, name)
        self._ends = _grey16_ends(image)

    def of(self, band: Image.Image) -> tuple[Tensor, Tensor | None]:
        """Colour [1 or 3, H, W] in sRGB and, where the picture is transparent, alpha [1, H, W]; in [-1, 1]."""
        return self._grey16(band) if self._is_16_bit else self._eight_bit(band)

    def _eight_bit(self, image: Image.Image) -> tuple[Tensor, Tensor | None]:
        alpha = None
        if image.has_transparency_data:  # an alpha channel, or colours that stand for transparent
            image = image.convert("LA" if self._mode == "L" else "RGBA")
            alpha = _from_pil(image.getchannel("A"))
        if image.mode != "CMYK":
            image = image.convert(self._mode)
        return _from_pil(self._srgb(image)), alpha

    def _grey16(self, image: Image.Image) -> tuple[Tensor, Tensor | None]:
        black, white = self._ends
        stored = np.asarray(image).astype(np.float32)  # [H, W], of either byte order
        grey = (stored - black) / (white - black)
        if self._profile is not None:  # ImageCms has no 16-bit grey, so the curve is sampled
            curve = np.asarray(self._srgb(RAMP).convert("L"))[0] / 255
            grey = np.interp(grey, np.linspace(0, 1, 256), curve).astype(np.float32)
        transparent = image.info.get("transparency")
        alpha = None if transparent is None else torch.from_numpy(stored != transparent)[None].float() * 2 - 1
        return torch.from_numpy(grey)[None] * 2 - 1, alpha

    def _srgb(self, image: Image.Image) -> Image.Image:
        """A picture of mode L, RGB or CMYK in the colours of sRGB, as L or RGB."""
        if self._profile is not None:
            mode, transform = self._profile
            if transform is not None and mode == "L":
                image = image.point(list(transform.apply(RAMP).convert("L").tobytes()))
            elif transform is not None:
                image = transform.apply(image.convert(mode))
        return image.convert("RGB") if image.mode == "CMYK" else image


def with_channels(colour: Tensor, alpha: Tensor | None, channels: int) -> Tensor:
    """Colour [1 or 3, H, W] and alpha [1, H, W] in [-1, 1] as the [C, H, W] asked for, contiguous.

    C 1 (luma) and 3: on white where alpha is below 1. C 4: colours as they are, and alpha, 1 where there is none.
    """
    if channels == 4:
        opaque = torch.ones_like(colour[:1])
        return torch.cat([colour.expand(3, -1, -1), opaque if alpha is None else alpha])
    if alpha is not None:
        colour = torch.lerp(torch.ones_like(colour), colour, (alpha + 1) / 2)  # 1 is white
    if channels == 3:
        return colour.expand(3, -1, -1).contiguous()
    if len(colour) == 1:
        return colour.contiguous()
    # Not a matrix product, whose roundings depend on the machine and on how many pixels there are.
    red, green, blue = (weight * part for weight, part in zip(LUMA, colour, strict=True))
    return (red + green + blue)[None]


def _from_pil(image: Image.Image) -> Tensor:
    """A PIL image of mode L or RGB as [1 or 3, H, W] in [-1, 1]."""
    stored = torch.from_numpy(np.array(image))  # [H, W] or [H, W, 3]
    return from_uint8(stored[None] if stored.ndim == 2 else stored.permute(2, 0, 1).contiguous())


def _grey16_ends(image: Image.Image) -> tuple[int, int]:
    """The values of black and white in a 16-bit grey picture.

    A TIFF may hold 12-bit samples or say that zero is white; Pillow hands its numbers on as they are.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0, 65535
    top = 2 ** image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
    white_is_zero = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return (top, 0) if white_is_zero else (0, top)


def _usable_profile(
    profile: bytes | None, mode: str, name: str
) -> tuple[str, ImageCms.ImageCmsTransform | None] | None:
    """The mode and the transform of a profile; None, with a note, for one that does not fit a picture of `mode`."""
    if not profile:
        return None
    try:
        found = _profile_to_srgb(profile)
        if found[0] != mode and (found[0], mode) != ("RGB", "L"):  # grey tagged sRGB is common
            raise ValueError(f"it describes {found[0]}, the picture is {mode}")
        return found
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        note(name, f"broken ICC profile ignored ({reason(error)})")
        return None


@lru_cache(maxsize=32)
def _profile_to_srgb(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode an ICC profile is for, and its way to sRGB; None where no colour moves by more than a level.

    Most tagged photographs are sRGB; leaving them alone saves more time than it takes to decode the JPEG.
    Raises `OSError`, `ValueError` or `PyCMSError` where the profile is broken.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space not in PROFILE_MODES:
        raise ValueError(f"it describes {space!r} colours")
    mode = PROFILE_MODES[space]
    # lcms would sample the curve of a grey profile at a few points only, and miss dark greys by ten levels.
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
    if mode == "RGB":
        lattice = np.indices((16, 16, 16), dtype=np.uint8).reshape(3, 64, 64) * 17  # 0, 17 ... 255 each
        colours = Image.fromarray(np.ascontiguousarray(lattice.transpose(1, 2, 0)))
        if np.asarray(ImageChops.difference(transform.apply(colours), colours)).max() <= 1:
            return mode, None
    return mode, transform
