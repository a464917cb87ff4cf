"""The built-in set of drawn digits: grey, 28 x 28 pixels as MNIST's, with labels; no download, no licence.

Every digit is a few strokes through points that are moved a little, slanted, turned, stretched and drawn with a pen of
some width. They are simpler than handwriting, and show what MNIST shows: ten classes that hang together, slant and
width that vary smoothly, black around white.

Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from latentcodec.pixels import LeftOut, from_uint8
from latentcodec.sources.labels import Labels

SIDE = 28
_FINE = 4  # drawn so many times larger and averaged down, for smooth edges
_JITTER = 0.035  # deviation of every point, in sides of the digit

Stroke = list[tuple[float, float]]


def _arc(x: float, y: float, width: float, height: float, start: float, end: float) -> Stroke:
    """Points of an ellipse around (x, y) with these half axes, `start` to `end` in turns, clockwise from the right."""
    turns = np.linspace(start, end, 9) * 2 * math.pi
    return [(x + width * math.cos(t), y + height * math.sin(t)) for t in turns]


# In the unit square, y downwards. A class may be written in more than one way.
_SEVEN: list[Stroke] = [[(0.15, 0.07), (0.5, 0.07), (0.82, 0.07)], [(0.82, 0.07), (0.6, 0.45), (0.42, 0.95)]]
_WAYS: list[list[list[Stroke]]] = [
    [[_arc(0.5, 0.5, 0.3, 0.45, 0.75, 1.78)]],
    [[[(0.5, 0.05), (0.5, 0.5), (0.5, 0.95)]],
     [[(0.34, 0.25), (0.52, 0.05), (0.52, 0.5), (0.52, 0.95)]]],
    [[[*_arc(0.5, 0.28, 0.3, 0.23, 0.52, 1.08), (0.5, 0.66), (0.2, 0.95)],
      [(0.2, 0.95), (0.5, 0.93), (0.82, 0.95)]]],
    [[_arc(0.46, 0.27, 0.28, 0.22, 0.6, 1.25), _arc(0.46, 0.71, 0.32, 0.24, 0.75, 1.42)]],
    [[[(0.6, 0.05), (0.38, 0.38), (0.15, 0.65), (0.5, 0.65), (0.88, 0.65)],
      [(0.65, 0.35), (0.65, 0.65), (0.65, 0.95)]],
     [[(0.2, 0.05), (0.2, 0.3), (0.25, 0.5), (0.5, 0.52), (0.75, 0.48)],
      [(0.76, 0.05), (0.75, 0.5), (0.72, 0.95)]]],
    [[[(0.78, 0.06), (0.5, 0.06), (0.3, 0.06)], [(0.3, 0.06), (0.27, 0.25), (0.25, 0.44)],
      [(0.25, 0.44), *_arc(0.46, 0.68, 0.32, 0.27, 0.78, 1.42)]]],
    [[[(0.68, 0.05), (0.42, 0.25), (0.24, 0.5), *_arc(0.5, 0.71, 0.28, 0.24, 0.5, 1.5)]]],
    [_SEVEN, [*_SEVEN, [(0.36, 0.5), (0.76, 0.5)]]],
    [[_arc(0.5, 0.27, 0.24, 0.21, 0.25, 1.25), _arc(0.5, 0.72, 0.29, 0.24, 0.75, 1.75)]],
    [[_arc(0.5, 0.29, 0.27, 0.24, 0.0, 1.0), [(0.77, 0.29), (0.74, 0.6), (0.62, 0.95)]]],
]  # fmt: skip


class DigitSource:
    """The drawn digits as an image source: image `index` is of class `index` mod 10, mixed by a fixed draw.

    More channels than one are copies. Any index can be read: the length only says what an epoch is.
    """

    def __init__(self, channels: int, length: int = 10_000, seed: int = 0) -> None:
        self.channels, self.length, self.seed = channels, length, seed
        self.left_out: list[LeftOut] = []

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"drawn digit {index}"

    def size(self, index: int) -> tuple[int, int]:
        return SIDE, SIDE

    def read(self, index: int) -> Tensor:
        """[C, 28, 28] float32 in [-1, 1]: white on black."""
        picture = from_uint8(torch.from_numpy(draw_digit(self.seed, index).copy()))
        return picture[None].repeat(self.channels, 1, 1)

    @cached_property
    def labels(self) -> Labels:
        numbers = np.array([digit_of(self.seed, index) for index in range(self.length)], dtype=np.int64)
        return Labels(numbers, [str(k) for k in range(10)])


def digit_of(seed: int, index: int) -> int:
    """The class of drawn digit `index`, 0 to 9: every ten images in a row hold each once."""
    order = np.random.default_rng([seed, index // 10, 7]).permutation(10)
    return int(order[index % 10])


@lru_cache(maxsize=20_000)  # 784 bytes each, and milliseconds to draw: runs in one process share them
def draw_digit(seed: int, index: int) -> NDArray[np.uint8]:
    """Drawn digit `index` of the set `seed`: [28, 28] uint8, white on black."""
    random = np.random.default_rng([seed, index])
    ways = _WAYS[digit_of(seed, index)]
    way = ways[int(random.integers(len(ways)))]
    matrix, middle = _pose(random)
    pen_width = random.uniform(1.7, 3.4) * _FINE
    shake = random.normal(0, _JITTER, (2, 2))  # of a whole stroke, as a smooth bend: neighbours move alike
    sheet = Image.new("L", (SIDE * _FINE, SIDE * _FINE), 0)
    pen = ImageDraw.Draw(sheet)
    for stroke in way:
        points = np.array(stroke) - 0.5
        points = (
            points
            + np.sin(2 * math.pi * points[:, ::-1]) @ shake
            + random.normal(0, _JITTER / 2, points.shape)
        )
        line = (_smooth(points) @ matrix.T + middle) * _FINE
        _draw_line(pen, line, pen_width)
    return np.asarray(sheet.reduce(_FINE))


def _pose(random: Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The unit square -> pixels: a matrix of size, stretch, slant and turn, and where its middle lies."""
    height = random.uniform(17, 21)
    width = height * random.uniform(0.55, 0.9)
    slant, turn = random.normal(0.12, 0.16), random.normal(0, 0.08)
    shear = np.array([[1, -slant], [0, 1]])
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return rotation @ shear @ np.diag([width, height]), SIDE / 2 + random.normal(0, 0.4, 2)


def _smooth(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """A Catmull-Rom curve through the points, eight steps from one to the next: [8 (n - 1) + 1, 2]."""
    if len(points) < 3:
        return points
    ends = np.concatenate([[2 * points[0] - points[1]], points, [2 * points[-1] - points[-2]]])
    a, b, c, d = ends[:-3, None], ends[1:-2, None], ends[2:-1, None], ends[3:, None]
    t = np.arange(8)[None, :, None] / 8
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return np.concatenate([curve.reshape(-1, 2), points[-1:]])


def _draw_line(pen: ImageDraw.ImageDraw, line: NDArray[np.float64], width: float) -> None:
    """A line with round joints and ends."""
    corners = [(float(x), float(y)) for x, y in line]
    pen.line(corners, fill=255, width=round(width), joint="curve")
    for x, y in (corners[0], corners[-1]):
        pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
