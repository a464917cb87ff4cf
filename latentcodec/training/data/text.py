"""Text over training crops, drawn with the fonts of the machine: what photographs alone do not teach a small codec.

Half of the drawn crops keep the photograph behind the letters, half are pages of one colour. Of the pages a quarter is
empty and a quarter has line art, with or without text. Words are made of random letters, since a codec must keep
strokes and not language. Everything drawn is a function of (seed, position).

Shapes: C channels, H W pixels of a crop; pixels in [-1, 1].
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageChops, ImageDraw, ImageFont
from torch import Tensor

from latentcodec.pixels import from_uint8, to_uint8
from latentcodec.pixels.colour import LUMA
from latentcodec.training.data.line_art import line_art

FONT_FOLDERS = {
    "linux": ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": (os.path.join(os.environ.get("WINDIR", "C:/Windows"), "Fonts"),),
}
# Latin twice, since most text that a codec meets is Latin; then Greek, Cyrillic and Chinese.
SCRIPTS = (
    "etaoinshrdlucmfwypvbgkjqxzETAOINSHRDLUCMFWYPVBGKJQXZ0123456789",
    "etaoetaoinshrdlucmfwypvbgkjqxz.,-0123456789",
    "αβγδεζηθικλμνξοπρστυφχψωΑΒΓΔΕΖΗΘΚΛΠΣΦΩ",
    "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфОЕАИНТСРВЛКМДПУЯ",
    "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年",
)
FONT_SIZES = (7, 28)  # pixels, drawn log-uniformly
LARGEST_ANGLE = 20.0  # degrees, of the third of the crops whose text is turned
LEAST_CONTRAST = 60  # levels between the brightness of text and that of its page
PLAIN_SHARE = 0.5  # of the drawn crops: a page of one colour instead of the photograph
EMPTY_SHARE = 0.25  # of the pages: no text at all
LINES_SHARE = 0.25  # of the pages: line art, half of them without text
# That a process keeps, each of one file and size. All sizes of several hundred files would take half a gigabyte.
FONTS_OPEN = 256
SHADED_SHARE = 0.5  # of the empty pages: shades from one colour to another; the others are flat


def find_fonts(exclude: Sequence[str] = ()) -> list[str]:
    """The TrueType and OpenType files of this machine, sorted by name; those whose name begins with one of `exclude`
    are left out.

    Raises ValueError where there are none.
    """
    platform = "linux" if sys.platform.startswith("linux") else sys.platform
    folders = [Path(folder).expanduser() for folder in FONT_FOLDERS.get(platform, ())]
    files = [
        f for folder in folders for f in folder.rglob("*") if f.suffix.lower() in (".ttf", ".otf", ".ttc")
    ]
    fonts = sorted((f.name, str(f)) for f in files if not f.name.startswith(tuple(exclude)))
    if not any(_letters_of(path) for _, path in fonts):
        raise ValueError(
            "data.text_share needs fonts, and there are none in "
            + ", ".join(map(str, folders))
            + ": install some"
        )
    return [path for _, path in fonts]


def draw_text(crop: Tensor, fonts: Sequence[str], random: Generator) -> Tensor:
    """[C, H, W] -> the crop with text over it, or in its place a page: with text, line art or both, flat, or shaded."""
    channels, height, width = crop.shape
    size = (width, height)
    lines = False
    if random.random() < PLAIN_SHARE:
        page = Image.new("RGB", size, _colour(random))
        kind = random.random()
        if kind < EMPTY_SHARE:
            return _pixels(_shaded(page, random), channels)
        lines = kind < EMPTY_SHARE + LINES_SHARE
    else:
        page = Image.fromarray(_levels(crop))
    brightness = float(np.asarray(page.convert("L"), dtype=np.float32).mean())
    ink = _colour(random)
    while abs(_brightness(ink) - brightness) < LEAST_CONTRAST:
        ink = _colour(random)
    mask = _mask(size, fonts, lines, random)
    return _pixels(Image.composite(Image.new("RGB", size, ink), page, mask), channels)


def _mask(size: tuple[int, int], fonts: Sequence[str], lines: bool, random: Generator) -> Image.Image:
    """Coverage of the crop by ink, 0 to 255: letters, or with `lines` line art, and in half of the cases both."""
    if not lines:
        return _letters(size, fonts, random)
    drawing = line_art(size, random)
    return drawing if random.random() < 0.5 else ImageChops.lighter(drawing, _letters(size, fonts, random))


def _letters(size: tuple[int, int], fonts: Sequence[str], random: Generator) -> Image.Image:
    """Coverage of the crop by letters, 0 to 255: lines of words of one font and size, one crop in three turned."""
    low, high = np.log(FONT_SIZES)
    points = round(float(np.exp(random.uniform(low, high))))
    letters: list[str] = []
    while not letters:  # many fonts hold one script of their own and no other
        path = fonts[int(random.integers(len(fonts)))]
        letters = _letters_of(path)
    font = _font(path, points)
    side = round(1.5 * max(size))  # a turned page still covers the crop
    mask = Image.new("L", (side, side))
    drawing = ImageDraw.Draw(mask)
    line = points * random.uniform(1.05, 1.6)
    top = -random.uniform(0, line)
    while top < side:
        words = ["".join(random.choice(letters, int(random.integers(1, 10)))) for _ in range(side // points)]
        drawing.text((-random.uniform(0, points), top), " ".join(words), 255, font)
        top += line
    if random.random() < 1 / 3:
        mask = mask.rotate(random.uniform(-LARGEST_ANGLE, LARGEST_ANGLE), Image.Resampling.BICUBIC)
    left, upper = (side - size[0]) // 2, (side - size[1]) // 2
    return mask.crop((left, upper, left + size[0], upper + size[1]))


def _shaded(page: Image.Image, random: Generator) -> Image.Image:
    """The page as it is, or, in `SHADED_SHARE` of the cases, with another colour at its far side and shades between."""
    if random.random() >= SHADED_SHARE:
        return page
    shade = Image.linear_gradient("L")
    if random.random() < 0.5:
        shade = shade.transpose(Image.Transpose.ROTATE_90)
    return Image.composite(Image.new("RGB", page.size, _colour(random)), page, shade.resize(page.size))


def _colour(random: Generator) -> tuple[int, int, int]:
    """Black, white, grey or any colour."""
    kind = random.random()
    if kind < 0.3:
        return (0, 0, 0) if random.random() < 0.5 else (255, 255, 255)
    if kind < 0.5:
        grey = int(random.integers(256))
        return grey, grey, grey
    red, green, blue = (int(level) for level in random.integers(0, 256, 3))
    return red, green, blue


def _brightness(colour: tuple[int, int, int]) -> float:
    return sum(weight * level for weight, level in zip(LUMA, colour, strict=True))


@lru_cache(maxsize=FONTS_OPEN)
def _font(path: str, points: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, points)


@cache
def _letters_of(path: str) -> list[str]:
    """Letters of the scripts that a font can draw; a script that it lacks comes as equal signs for missing letters.

    None of a file that is broken, and of a font of pictures of fixed sizes, as those of emoji are.
    """
    try:
        fonts = [_font(path, points) for points in (16, *FONT_SIZES)]
        drawn = {script: {bytes(fonts[0].getmask(letter)) for letter in script[:4]} for script in SCRIPTS}
    except OSError:
        return []
    return list("".join(script for script in SCRIPTS if len(drawn[script]) == len(set(script[:4]))))


def _levels(crop: Tensor) -> np.ndarray:
    """[C, H, W] -> [H, W, 3] uint8."""
    rgb = crop[:3] if crop.shape[0] >= 3 else crop[:1].expand(3, -1, -1)
    return to_uint8(rgb).permute(1, 2, 0).numpy()


def _pixels(page: Image.Image, channels: int) -> Tensor:
    """The page as [C, H, W]: grey for one channel, further channels opaque."""
    mode = "L" if channels == 1 else "RGB"
    pixels = from_uint8(torch.from_numpy(np.array(page.convert(mode))))
    pixels = pixels[None] if mode == "L" else pixels.permute(2, 0, 1)
    opaque = torch.ones(max(0, channels - 3), *pixels.shape[1:])
    return torch.cat([pixels, opaque])[:channels].contiguous()
