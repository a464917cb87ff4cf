"""Whether text stays legible: drawn lines at 8 to 24 pixels, read by an OCR program before and after a codec.

PSNR hides this: a text of few pixels can be lost while the picture keeps its decibels. The reader is RapidOCR, an
optional extra (`pip install latentcodec[ocr]`) whose models come with it, so that no network is needed.

Shapes: C channels, H W pixels.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latentcodec.pixels import from_uint8, to_uint8

SIZES = (8, 10, 12, 16, 24)  # pixels of the font
LINES = (
    "Pack my box with five dozen jugs",
    "The quick brown fox jumps over 13",
    "Sphinx of black quartz judge 2468",
    "How vexingly quick daft zebras go",
)
WIDTH = 512  # pixels of a page of text

Reader = Callable[[Tensor], str]
"""[C, H, W] in [-1, 1] -> what it says, lines joined by spaces."""


@dataclass(frozen=True)
class Legibility:
    """How much of the text was read, by the size of the font in pixels; 1 is all, 0 nothing."""

    original: dict[int, float]
    codec: dict[int, float]


def text_page(size: int, channels: int = 3) -> Tensor:
    """[C, H, W] in [-1, 1]: `LINES` in a font of `size` pixels, dark on light; sides are multiples of 32."""
    pitch = 2 * size
    height = -(-(len(LINES) + 1) * pitch // 32) * 32
    image = Image.new("L", (WIDTH, height), 236)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for number, line in enumerate(LINES):
        pen.text((size, size + number * pitch), line, fill=24, font=font)
    return from_uint8(torch.from_numpy(np.asarray(image).copy())[None]).expand(channels, -1, -1)


def open_reader() -> Reader:
    """RapidOCR. Raises ValueError where it is not installed."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ValueError(f"text is read by RapidOCR: pip install rapidocr onnxruntime ({error})") from error
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    engine = RapidOCR()
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)

    def read(picture: Tensor) -> str:
        pixels = to_uint8(picture[:3]).permute(1, 2, 0).squeeze(-1).numpy()
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[:, :, None], 3, axis=2)
        found = engine(pixels[:, :, ::-1])  # it takes blue first
        return " ".join(getattr(found, "txts", None) or ())

    return read


def legibility(reconstruct: Callable[[Tensor], Tensor], channels: int, read: Reader) -> Legibility:
    """Text before and after `reconstruct`, which maps [1, C, H, W] to the same."""
    truth = " ".join(LINES)
    original, codec = {}, {}
    for size in SIZES:
        page = text_page(size, channels)
        original[size] = similarity(truth, read(page))
        codec[size] = similarity(truth, read(reconstruct(page[None])[0]))
    return Legibility(original, codec)


def similarity(truth: str, said: str) -> float:
    """1 - edit distance (Levenshtein) / length of the longer text, spaces ignored; 1 for equal texts."""
    a, b = truth.replace(" ", ""), said.replace(" ", "")
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return 1 - row[-1] / max(len(a), len(b), 1)
