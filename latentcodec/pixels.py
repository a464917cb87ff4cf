"""Pictures in every form, and the one form that the rest of the package knows: float32 NCHW in [-1, 1].

Here image files, PIL images and 8-bit tensors become pixels and pixels become files; pictures are padded,
cropped and laid out in a grid. Choosing, shuffling and augmenting them is the data set's affair, not ours.

Shapes: B batch, C channels, H W pixels.
"""

import io
import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageChops, ImageCms, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from latentcodec.files import write_whole

# The formats people keep photographs in. Pillow reads forty more, most of them rare and several with a record
# of security holes (FITS, PSD, EPS ...). A telephone's MPO is opened as the JPEG that it begins with.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
)
WRITERS: dict[str, tuple[str, dict[str, object]]] = {  # suffix -> Pillow's name of the format, its options
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True, "exact": True}),  # exact keeps the colour of invisible pixels
}
GREY_MODES = frozenset({"1", "L", "LA", "La"})
COLOUR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"})
GREY16_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
PROFILE_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # ICC colour space -> mode of its pictures
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
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights of Pillow's own mode "L"
RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None])  # every 8-bit grey once
SEPARATOR_PIXELS = 2  # between the pictures of a grid


class UnreadableImage(ValueError):
    """A picture that cannot be read; the message names the file and the reason."""


def find_images(folder: str | Path) -> list[Path]:
    """Every image file below `folder`, sorted; recognised by its suffix (`IMAGE_SUFFIXES`, in any case).

    Names that start with a dot are left out, files and folders alike: they are thumbnails, caches and the
    resource forks of macOS. Links to files are followed, links to folders are not. Raises `ValueError`
    naming the folder if it does not exist, cannot be listed or holds no image.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: the folder cannot be listed ({error.strerror})") from error

    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    found: list[Path] = []
    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk descends into these
        images = (name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES)
        found += [Path(here, name) for name in images if not name.startswith(".")]
    if not found:
        raise ValueError(f"{folder}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(found)


def load_image(path: str | Path, channels: int = 3) -> Tensor:
    """An image file as [1, C, H, W] float32 in [-1, 1], read as `decode_image` reads it."""
    return decode_image(path, channels)[None]


def decode_image(
    source: str | Path | bytes | Image.Image, channels: int = 3, name: str | None = None
) -> Tensor:
    """A file, the bytes of a file or a PIL image as [C, H, W] float32 in [-1, 1].

    * Formats: JPEG (and MPO), PNG, WebP, GIF, BMP, TIFF and AVIF; of an animation or a many-page file the
      first frame, of a PIL image the frame it stands at.
    * The EXIF orientation is applied. An ICC profile is followed to sRGB, also for CMYK; CMYK without one is
      converted as Pillow does it. A broken profile and broken EXIF data are ignored, with a warning that
      names the file.
    * 16-bit grey keeps its 65536 levels (12-bit TIFF its 4096); the curve of a grey profile is known at 8
      bits only. 16-bit colour, and 16-bit grey with an alpha channel, are opened by Pillow as 8 bit: their
      low bytes are lost.
    * `channels` 1 or 3: transparent pixels are composited on white; 1 is the luma of ITU-R BT.601, unrounded.
      `channels` 4: RGB as stored and alpha, opaque (1) where the picture has none.

    Raises `UnreadableImage` naming `name` (by default the path) and the reason, whatever is wrong: no such
    file, not an image, truncated, more pixels than `PIL.Image.MAX_IMAGE_PIXELS` as the caller has set it, or
    a mode without a known range (F and I, floats and 32-bit integers) or conversion (LAB). Raises
    `ValueError` for other `channels`.
    """
    if channels not in (1, 3, 4):
        raise ValueError(f"channels={channels}: pictures are read as 1 (grey), 3 (RGB) or 4 (RGB and alpha)")
    name = name or _name(source)
    try:
        if isinstance(source, Image.Image):
            return _read(source, channels, name)
        with _opened(source) as image:
            _refuse_bomb(*image.size)
            return _read(image, channels, name)
    except Exception as error:  # Pillow's decoders raise nearly every type; one bad file must not end a run
        raise UnreadableImage(f"{name}: {_reason(error)}") from error


def image_size(source: str | Path | bytes, name: str | None = None) -> tuple[int, int]:
    """Height and width in pixels that `decode_image` gives, from the header of a file or of its bytes alone.

    Raises `UnreadableImage` where there is no header; what follows a sound one may still be broken.
    """
    name = name or _name(source)
    try:
        with _opened(source) as image:
            width, height = image.size
            if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose size Pillow has turned already
                return height, width
            return (width, height) if _turn(image, name) in SIDEWAYS else (height, width)
    except Exception as error:  # as in `decode_image`
        raise UnreadableImage(f"{name}: {_reason(error)}") from error


def save_image(x: Tensor, path: str | Path) -> None:
    """Writes [1, C, H, W] or [C, H, W] in [-1, 1], C 1 (grey), 3 (RGB) or 4 (RGB, alpha), as `encode_image` does.

    Missing folders are made. The file appears whole or not at all: a killed process leaves an earlier file as
    it was, and at worst a hidden `.tmp` beside it. Raises `OSError` where the disk refuses, and `ValueError`
    as `encode_image`.
    """
    write_whole(Path(path), encode_image(x, Path(path)))


def encode_image(x: Tensor, path: Path) -> bytes:
    """The bytes that a file of this name is to hold: [1, C, H, W] or [C, H, W] in [-1, 1], clamped, at 8 bits.

    PNG and WebP keep every 8-bit value, JPEG has quality 95 without chroma subsampling. Raises `ValueError`
    naming the path for another suffix or shape, or pixels that are not finite.
    """
    if path.suffix.lower() not in WRITERS:
        raise ValueError(f"{path}: pictures are written as {', '.join(WRITERS)}, not as {path.suffix!r}")
    file_format, options = WRITERS[path.suffix.lower()]
    picture = x[0] if x.ndim == 4 and len(x) == 1 else x
    if picture.ndim != 3 or len(picture) not in (1, 3, 4) or picture.numel() == 0:
        raise ValueError(f"{path}: a picture is [1, C, H, W] or [C, H, W], C 1, 3 or 4, not {list(x.shape)}")
    if not torch.isfinite(picture).all():
        raise ValueError(f"{path}: not written, for the picture holds NaN or infinite pixels")
    pixels = to_uint8(picture).cpu().permute(1, 2, 0).numpy()  # [H, W, C]
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    encoded = io.BytesIO()
    try:
        image.save(encoded, file_format, **options)
    except (OSError, ValueError) as error:  # JPEG has no alpha; JPEG and WebP have a largest size
        raise ValueError(f"{path}: the picture cannot be written as {file_format} ({error})") from error
    return encoded.getvalue()


def to_uint8(x: Tensor) -> Tensor:
    """Floats in [-1, 1] of any shape to 0..255: round(127.5 (x + 1)), clamped; undoes `from_uint8`."""
    return (x.float() + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(u: Tensor) -> Tensor:
    """0..255 of any shape to float32 in [-1, 1]: u / 127.5 - 1."""
    return u.float() / 127.5 - 1


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


def _opened(source: str | Path | bytes) -> Image.Image:
    """A file, or the bytes of one, of which Pillow has read the header."""
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def _name(source: object) -> str:
    """What messages call a source that came without a name."""
    if isinstance(source, str | Path):
        return str(source)
    return str(getattr(source, "filename", "")) or f"image ({type(source).__name__})"


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow names the file again, or the address of a buffer
        return (
            f"empty, damaged, not an image (formats that are read: {', '.join(FORMATS)}), or with channels that "
            "have no meaning, such as two of which none is alpha"
        )
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _refuse_bomb(width: int, height: int) -> None:
    """Pillow only warns between one and two times its limit; a few kilobytes would unfold to 300 MB."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"{width * height} pixels ({width} x {height}) are more than PIL.Image.MAX_IMAGE_PIXELS"
            f" = {limit}; set that higher if you trust the file"
        )


def _read(image: Image.Image, channels: int, name: str) -> Tensor:
    """An open picture as [C, H, W] in [-1, 1]."""
    image.load()  # before its EXIF is asked for: loading a TIFF turns it, and says so there
    if image.mode not in GREY_MODES | COLOUR_MODES | GREY16_MODES:
        raise ValueError(f"mode {image.mode!r} is not read; convert it to L, I;16, RGB or RGBA first")
    upright = _upright(image, name)
    if image.mode in GREY16_MODES:
        colour, alpha = _grey16(upright, *_grey16_ends(image), name)
    else:
        colour, alpha = _eight_bit(upright, name)
    if channels == 4:
        opaque = torch.ones_like(colour[:1])
        return torch.cat([colour.expand(3, -1, -1), opaque if alpha is None else alpha])
    if alpha is not None:
        colour = torch.lerp(torch.ones_like(colour), colour, (alpha + 1) / 2)  # 1 is white
    if channels == 3:
        return colour.expand(3, -1, -1).contiguous()
    if len(colour) == 1:
        return colour
    return torch.einsum("chw,c->hw", colour, torch.tensor(LUMA))[None]


def _upright(image: Image.Image, name: str) -> Image.Image:
    """The picture turned as its EXIF orientation says.

    Not by `ImageOps.exif_transpose`, which writes the EXIF block anew and fails on a damaged entry that has
    nothing to do with the orientation.
    """
    turn = _turn(image, name)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image, name: str) -> Image.Transpose | None:
    """What makes the picture upright, if anything need be done."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # a damaged block raises nearly every type; the pixels are sound
        warnings.warn(f"{name}: broken EXIF data ignored ({_reason(error)})", stacklevel=2)
        return None


def _eight_bit(image: Image.Image, name: str) -> tuple[Tensor, Tensor | None]:
    """Colour [1 or 3, H, W] in sRGB and, where the picture is transparent, alpha [1, H, W]; in [-1, 1]."""
    profile = image.info.get("icc_profile")
    grey = image.mode in GREY_MODES
    alpha = None
    if image.has_transparency_data:  # an alpha channel, or colours that stand for transparent
        image = image.convert("LA" if grey else "RGBA")
        alpha = _from_pil(image.getchannel("A"))
    if image.mode != "CMYK":
        image = image.convert("L" if grey else "RGB")
    return _from_pil(_srgb(image, profile, name)), alpha


def _grey16_ends(image: Image.Image) -> tuple[int, int]:
    """The values of black and white in a 16-bit grey picture.

    A TIFF may hold 12-bit samples or say that zero is white; Pillow hands its numbers on as they are.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0, 65535
    top = 2 ** image.tag_v2[TiffImagePlugin.BITSPERSAMPLE][0] - 1
    white_is_zero = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return (top, 0) if white_is_zero else (0, top)


def _grey16(image: Image.Image, black: int, white: int, name: str) -> tuple[Tensor, Tensor | None]:
    """Grey [1, H, W] and, where one value stands for transparent, alpha [1, H, W]; in [-1, 1]."""
    stored = np.asarray(image).astype(np.float32)  # [H, W], of either byte order
    grey = (stored - black) / (white - black)
    if profile := image.info.get("icc_profile"):  # ImageCms has no 16-bit grey, so the curve is sampled
        curve = np.asarray(_srgb(RAMP, profile, name).convert("L"))[0] / 255
        grey = np.interp(grey, np.linspace(0, 1, 256), curve).astype(np.float32)
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else torch.from_numpy(stored != transparent)[None].float() * 2 - 1
    return torch.from_numpy(grey)[None] * 2 - 1, alpha


def _from_pil(image: Image.Image) -> Tensor:
    """A PIL image of mode L or RGB as [1 or 3, H, W] in [-1, 1]."""
    stored = torch.from_numpy(np.array(image))  # [H, W] or [H, W, 3]
    return from_uint8(stored[None] if stored.ndim == 2 else stored.permute(2, 0, 1).contiguous())


def _srgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """A picture of mode L, RGB or CMYK in the colours of sRGB, as L or RGB."""
    if profile:
        try:
            mode, transform = _profile_to_srgb(profile)
            if mode != image.mode and (mode, image.mode) != ("RGB", "L"):  # grey tagged sRGB is common
                raise ValueError(f"it describes {mode}, the picture is {image.mode}")
            if transform is not None and mode == "L":
                image = image.point(list(transform.apply(RAMP).convert("L").tobytes()))
            elif transform is not None:
                image = transform.apply(image.convert(mode))
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            warnings.warn(f"{name}: broken ICC profile ignored ({_reason(error)})", stacklevel=2)
    return image.convert("RGB") if image.mode == "CMYK" else image


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
