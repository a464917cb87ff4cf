"""The built-in set of drawn pictures: no download, no licence, the same pictures on every machine.

Four kinds share the set. Dead leaves, shapes of power-law sizes that cover one another, have the edges and
the power spectrum (about 1/frequency^2) of photographs: Lee, Mumford and Huang 2001, "Occlusion models for
natural images", https://doi.org/10.1023/A:1011109015675. Smooth gradients, lines of text-like strokes and
fine textures add what leaves lack. A codec trained on them works on photographs too; it is no substitute for
them. Shapes: C channels, S the side of a picture in pixels (height = width), N leaves.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from latentcodec.pixels import LeftOut

Picture = NDArray[np.float32]  # [S, S, 3], 0 to 255, not yet clipped

SIDE = 256
KEPT = 512  # pictures that a source keeps once they are drawn: 100 MB, and 6 ms of a core each time one is asked for
_FINE = 2 * SIDE  # shapes are drawn at twice the size and averaged down, for smooth edges
_TEXTURES = 12


class SyntheticSource:
    """The drawn set as an image source: `len` pictures of 256 x 256 pixels with any number of channels.

    One channel is grey; more than three are the channels of further pictures. Any index can be read: the
    length only says after how many pictures the training stream calls it an epoch.
    """

    def __init__(self, channels: int, length: int = 4096, seed: int = 0) -> None:
        self.channels, self.length, self.seed = channels, length, seed
        self.left_out: list[LeftOut] = []
        self.labels: None = None
        self._kept: dict[tuple[int, int], NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"synthetic picture {index}"

    def size(self, index: int) -> tuple[int, int]:
        return SIDE, SIDE

    def read(self, index: int) -> Tensor:
        """[C, 256, 256] float32 in [-1, 1]."""
        pictures = [self._drawn(index, layer) for layer in range(math.ceil(self.channels / 3))]
        image = torch.from_numpy(np.concatenate(pictures, axis=2)).permute(2, 0, 1) / 127.5 - 1
        image = image.mean(0, keepdim=True) if self.channels == 1 else image[: self.channels]
        return image.contiguous()

    def _drawn(self, index: int, layer: int) -> NDArray[np.uint8]:
        """[256, 256, 3]: drawn now, or kept from before."""
        picture = self._kept.get((index, layer))
        if picture is None:
            picture = draw(self.seed, index, layer)
            if len(self._kept) < KEPT:
                self._kept[index, layer] = picture
        return picture


def draw(seed: int, index: int, layer: int = 0) -> NDArray[np.uint8]:
    """Draws picture `index` of the set `seed`: [256, 256, 3] uint8. Layers are unrelated pictures of one
    index."""
    random = np.random.default_rng([seed, index, layer])
    kind = random.choice(len(_KINDS), p=_SHARES)
    picture = _light(random, _KINDS[kind](random))
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def draw_leaves(random: Generator) -> Picture:
    """Dead leaves: discs, blades and polygons of power-law sizes; some are shaded, some carry a texture."""
    count = int(random.integers(60, 450))
    radius = _power_law(random, count, smallest=random.uniform(3, 12), largest=random.uniform(70, 140))
    radius = radius[
        np.argsort(-radius * np.exp(random.normal(0, 0.6, count)))
    ]  # large leaves tend to fall first
    centre = random.uniform(-10, SIDE + 10, (count, 2))
    label = _draw_shapes(random, centre, radius)  # [2S, 2S], the number of the leaf on top; 0 is the ground
    colour = _palette(random, count + 1).astype(np.uint8)
    picture = np.asarray(Image.fromarray(colour.take(label, axis=0)).reduce(2), dtype=np.float32)

    # Every second leaf is shaded along a slope through its centre, every second one is grainy.
    centre = np.concatenate([[[SIDE / 2, SIDE / 2]], centre])
    slope = random.normal(0, 25, (count + 1, 2)) / np.concatenate([[SIDE], radius])[:, None]
    slope *= random.random((count + 1, 1)) < 0.5
    amplitude = random.gamma(1.5, 7, count + 1) * (random.random(count + 1) < 0.5)
    texture = random.integers(0, _TEXTURES, count + 1)
    label = label[::2, ::2].copy()
    slope_x, slope_y, level = _spread(label, slope[:, 0], slope[:, 1], -(slope * centre).sum(axis=1))
    (grain,) = _spread(label, amplitude)
    y, x = _grid()
    return picture + (slope_x * x + slope_y * y + level + grain * _texture(texture, label))[..., None]


def draw_gradient(random: Generator) -> Picture:
    """A smooth picture: a few colours blended over the plane, as in skies and out-of-focus backgrounds."""
    size = int(random.integers(2, 7))
    coarse = _palette(random, size * size).reshape(size, size, 3).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32)


def draw_text(random: Generator) -> Picture:
    """Lines of words in an invented alphabet, on plain paper, on a gradient or over dead leaves."""
    ground = _palette(random, 1)[0] + np.zeros((SIDE, SIDE, 3), np.float32)
    choice = random.random()
    if choice < 0.5:
        ground = draw_gradient(random) if choice < 0.25 else draw_leaves(random)
    ink = Image.new("L", (_FINE, _FINE), 0)
    pen = ImageDraw.Draw(ink)
    alphabet = [_glyph(random) for _ in range(14)]
    baseline = random.uniform(0, 30)
    while baseline < _FINE:
        height = float(math.exp(random.uniform(math.log(12), math.log(90))))
        for _ in range(int(random.integers(1, 5))):
            _write_line(random, pen, alphabet, baseline, height)
            baseline += 1.6 * height
    opacity = np.asarray(ink.reduce(2), dtype=np.float32)[..., None] / 255
    dark = ground.mean() > 128
    colour = _palette(random, 1)[0] * 0.3 + (0 if dark else 175)
    return ground * (1 - opacity) + colour * opacity


def draw_texture(random: Generator) -> Picture:
    """A few regions, each filled with waves or noise of its own frequency, direction and colours."""
    count = int(random.integers(1, 9))
    centre = random.uniform(0, SIDE, (count, 2))
    label = _draw_shapes(random, centre, random.uniform(40, 160, count))[::2, ::2].copy()
    frequency = np.exp(random.uniform(math.log(0.03), math.log(2.2), count + 1))  # radians a pixel
    angle = random.uniform(0, math.pi, count + 1)
    wave_x, wave_y = _spread(label, frequency * np.cos(angle), frequency * np.sin(angle))
    (bend,) = _spread(label, random.uniform(0, 1.5, count + 1))  # lets the noise bend the waves
    (noisy,) = _spread(label, random.random(count + 1) < 0.5)
    noise = _texture(random.integers(0, _TEXTURES, count + 1), label)
    y, x = _grid()
    pattern = np.where(noisy > 0, noise, np.sin(wave_x * x + wave_y * y + bend * noise))
    contrast = random.gamma(2, 12, (count + 1, 1)) * random.normal(1, 0.2, (count + 1, 3))
    ground = _palette(random, count + 1).take(label, axis=0)
    return ground + contrast.astype(np.float32).take(label, axis=0) * pattern[..., None]


_KINDS: tuple[Callable[[Generator], Picture], ...] = (draw_leaves, draw_gradient, draw_text, draw_texture)
_SHARES = (0.6, 0.08, 0.16, 0.16)


def _power_law(random: Generator, count: int, smallest: float, largest: float) -> NDArray[np.float64]:
    """Radii with density proportional to r^-3, which makes the picture look alike at every scale."""
    quantile = random.random(count)
    return (smallest**-2 - quantile * (smallest**-2 - largest**-2)) ** -0.5


def _draw_shapes(random: Generator, centre: NDArray, radius: NDArray) -> NDArray[np.int32]:
    """Draws shape after shape, each over those before it: [2S, 2S], the number (from 1) of the one on top.

    An outline is a circle, a wavy circle or a regular polygon in polar form, squeezed and turned.
    """
    count = len(radius)
    turn = np.arange(36) * (2 * math.pi / 36)  # 36 corners: divisible by those of every polygon below
    lobes = random.choice([2, 3, 5], (count, 1))
    wavy = 1 + random.uniform(0, 0.3, (count, 1)) * np.cos(lobes * turn)
    sector = 2 * math.pi / random.choice([3, 4, 4, 6], (count, 1))
    straight = np.cos(sector / 2) / np.cos(turn % sector - sector / 2)
    reach = np.choose(random.choice(3, (count, 1), p=(0.3, 0.35, 0.35)), [np.ones_like(wavy), wavy, straight])
    squeeze = np.exp(-random.exponential(0.6, (count, 1)))
    along, across = reach * np.cos(turn), reach * np.sin(turn) * squeeze
    tilt = random.uniform(0, 2 * math.pi, (count, 1))
    x = np.cos(tilt) * along - np.sin(tilt) * across
    y = np.sin(tilt) * along + np.cos(tilt) * across
    outlines = 2 * (centre[:, None] + radius[:, None, None] * np.stack([x, y], axis=2))  # [N, 36, 2]

    canvas = Image.new("I", (_FINE, _FINE), 0)
    pen = ImageDraw.Draw(canvas)
    for number, outline in enumerate(outlines.reshape(count, 72).tolist(), start=1):
        pen.polygon(outline, fill=number)
    return np.asarray(canvas)


def _palette(random: Generator, count: int) -> Picture:
    """`count` colours [N, 3] that could belong to one scene: a few hues, mostly muted, all brightnesses."""
    hues = np.array(
        [0.08, 0.1, 0.28, 0.58, 0.6, random.random(), random.random()]
    )  # earth, leaf, sky, anything
    hue = random.choice(random.choice(hues, 3), count) + random.normal(0, 0.03, count)
    saturation = random.beta(1.3, 2, count) * random.uniform(0.4, 1.3)
    brightness = np.clip(random.beta(2.6, 2) + random.normal(0, 0.3, count), 0.03, 1)
    phase = (hue[:, None] + np.array([0, 2 / 3, 1 / 3])) * 2 * math.pi
    colour = brightness[:, None] * (1 - saturation[:, None] * (0.5 - 0.5 * np.cos(phase)))
    return (255 * np.clip(colour, 0, 1)).astype(np.float32)


def _glyph(random: Generator) -> list[list[tuple[float, float]]]:
    """A letter: two to four strokes, each through two or three points of a 3 x 4 grid in the unit square."""
    strokes = []
    for _ in range(int(random.integers(2, 5))):
        points = random.integers(0, (3, 4), (int(random.integers(2, 4)), 2)) / (2, 3)
        strokes.append([(float(x), float(y)) for x, y in points])
    return strokes


def _write_line(
    random: Generator, pen: ImageDraw.ImageDraw, alphabet: list, baseline: float, height: float
) -> None:
    width = max(1, round(height * random.uniform(0.06, 0.16)))
    x = random.uniform(0, 80)
    end = _FINE * random.uniform(0.5, 1)
    while x < end:
        for letter in random.integers(0, len(alphabet), random.integers(2, 9)):
            for stroke in alphabet[letter]:
                points = [(x + 0.5 * height * u, baseline + height * v) for u, v in stroke]
                pen.line(points, fill=255, width=width, joint="curve")
            x += 0.75 * height
        x += 0.6 * height


def _spread(label: NDArray[np.int32], *values: NDArray) -> list[NDArray[np.float32]]:
    """Gives every pixel the value of its leaf: from [N] to [S, S] each."""
    return [value.astype(np.float32).take(label) for value in values]


@cache
def _grid() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The row and the column of each pixel: [S, 1] and [1, S]."""
    steps = np.arange(SIDE, dtype=np.float32)
    return steps[:, None], steps[None, :]


def _texture(choice: NDArray[np.int64], label: NDArray[np.int32]) -> NDArray[np.float32]:
    """Noise of unit variance [S, S] in which every leaf has the texture of its choice."""
    pixel = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
    return _textures().take(choice.take(label) * (SIDE * SIDE) + pixel)


@cache
def _textures() -> NDArray[np.float32]:
    """Noise fields [12, S, S] of unit variance, from white to coarse, some of them stretched to fibres."""
    random = np.random.default_rng(0)
    fy, fx = np.fft.fftfreq(SIDE)[:, None] * SIDE, np.fft.rfftfreq(SIDE)[None, :] * SIDE
    fields = []
    for i in range(_TEXTURES):
        stretch = (1, 1, 6, 1 / 6)[i % 4]
        frequency = np.sqrt((fy * stretch) ** 2 + (fx / stretch) ** 2 + 9)
        spectrum = np.fft.rfft2(random.normal(size=(SIDE, SIDE))) * frequency ** -(0.3 + 1.5 * i / _TEXTURES)
        field = np.fft.irfft2(spectrum, s=(SIDE, SIDE))
        fields.append((field - field.mean()) / field.std())
    return np.stack(fields).astype(np.float32)


def _light(random: Generator, picture: Picture) -> Picture:
    """Uneven light over the whole picture, and on every third picture a little sensor noise."""
    ramp = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)
    across, down = random.normal(0, 0.3, 2)
    gain = np.exp(np.float32(across) * ramp[None, :, None] + np.float32(down) * ramp[:, None, None])
    lit = picture * gain
    if random.random() < 0.33:
        lit += random.standard_normal((SIDE, SIDE, 1), dtype=np.float32) * np.float32(random.uniform(0.5, 6))
    return lit
