"""Line art for drawn pages: strokes, hatching, rings and boxes, as in drawings, maps and on screens.

Everything drawn is a function of the generator that is given.

Shapes: H W pixels of a page.
"""

from __future__ import annotations

import math

from numpy.random import Generator
from PIL import Image, ImageDraw

WIDTHS = (0.7, 3.0)  # pixels of a line
PITCHES = (2.5, 12.0)  # pixels from one line of a hatching to the next
SMOOTH_SHARE = 0.7  # of the pages: edges are smooth; those of the others are whole pixels, as on screens
FINER = 4  # a smooth page is drawn so many times as large, and shrunk


def line_art(size: tuple[int, int], random: Generator) -> Image.Image:
    """Coverage of a page of `size` (W, H) by lines, 0 to 255: one kind of drawing, and in half of the cases two."""
    scale = FINER if random.random() < SMOOTH_SHARE else 1
    mask = Image.new("L", (size[0] * scale, size[1] * scale))
    for _ in range(int(random.integers(1, 3))):
        kind = (_strokes, _hatching, _rings, _boxes)[int(random.integers(4))]
        kind(ImageDraw.Draw(mask), mask.size, scale, random)
    return mask.resize(size, Image.Resampling.BOX)


def _strokes(pen: ImageDraw.ImageDraw, size: tuple[int, int], scale: int, random: Generator) -> None:
    """Lines of several corners, from anywhere to anywhere."""
    for _ in range(int(random.integers(2, 20))):
        corners = random.uniform(-0.1, 1.1, (int(random.integers(2, 6)), 2)) * size
        pen.line([tuple(corner) for corner in corners], 255, _width(scale, random), joint="curve")


def _hatching(pen: ImageDraw.ImageDraw, size: tuple[int, int], scale: int, random: Generator) -> None:
    """Parallel lines at any angle over all of the page, or over a part of it."""
    width, pitch = _width(scale, random), scale * random.uniform(*PITCHES)
    angle, reach = random.uniform(0, math.pi), math.hypot(*size)
    along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
    x, y = random.uniform(0, 1, 2) * size
    half = reach * random.uniform(0.2, 1)
    offset = -half
    while offset < half:
        middle = (x + offset * across[0], y + offset * across[1])
        ends = [(middle[0] + end * along[0], middle[1] + end * along[1]) for end in (-half, half)]
        pen.line(ends, 255, width)
        offset += pitch


def _rings(pen: ImageDraw.ImageDraw, size: tuple[int, int], scale: int, random: Generator) -> None:
    """Circles, ellipses and parts of them."""
    for _ in range(int(random.integers(1, 10))):
        (x, y), (a, b) = random.uniform(0, 1, 2) * size, random.uniform(0.03, 0.6, 2) * min(size)
        b = a if random.random() < 0.5 else b
        start = random.uniform(0, 360)
        span = 360.0 if random.random() < 0.5 else random.uniform(30, 330)
        pen.arc((x - a, y - b, x + a, y + b), start, start + span, 255, _width(scale, random))


def _boxes(pen: ImageDraw.ImageDraw, size: tuple[int, int], scale: int, random: Generator) -> None:
    """Frames and filled boxes with upright sides, as windows and buttons are; a filled one may hide others."""
    for _ in range(int(random.integers(1, 8))):
        (left, top), (width, height) = random.uniform(-0.2, 1, 2) * size, random.uniform(0.05, 0.8, 2) * size
        corners = tuple(int(value) for value in (left, top, left + width, top + height))
        fill = int(random.integers(256)) if random.random() < 0.4 else None
        pen.rectangle(corners, fill, 255, _width(scale, random))


def _width(scale: int, random: Generator) -> int:
    """Of a line, in pixels of a page that is drawn `scale` times as large."""
    return max(1, round(scale * random.uniform(*WIDTHS)))
