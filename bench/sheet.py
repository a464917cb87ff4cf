"""One sheet of pictures at 1:1 for the card of a codec: what the eye sees and PSNR does not.

    python bench/sheet.py --codec CODEC --klt_images PHOTOS --out SHEET.png [--images FOLDER]

Each row is one picture: the original, the codec, a KLT of as many numbers, and JPEG of at most as many bytes as the
latent at 8 bits a number; where JPEG cannot be so small, its column says so. Without --images the pictures are drawn:
leaves, text of 8 to 16 pixels, line art, a screen. Of larger pictures the middle is shown. No pixel is resized; the
file is PNG or lossless WebP.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latentcodec.codec import LatentCodec
from latentcodec.machine import use_cores
from latentcodec.pixels import crop_middle, from_uint8, image_grid, to_uint8
from latentcodec.quality import image_codecs
from latentcodec.quality.klt import KLT
from latentcodec.quality.metrics import reconstruct
from latentcodec.quality.text import LINES
from latentcodec.report import results as report
from latentcodec.sources.folders import FolderImages
from latentcodec.sources.synthetic import draw_leaves

SIDE = 192  # pixels of a picture on the sheet
LABEL = 18  # pixels of the line above the pictures
KLT_CROP = 512  # pixels a side that the KLT sees of a photograph: the middle
SUFFIXES = (".png", ".webp")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--codec", required=True, help="folder, hub id or bundled name")
    add("--klt_images", type=Path, required=True, help="folder of photographs that the KLT is fitted on")
    add("--out", type=Path, required=True, help=f"file to write, {' or '.join(SUFFIXES)}")
    add(
        "--images",
        type=Path,
        help="folder of pictures of your own, at least 192 pixels a side; default: drawn ones",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    report.print_threads(use_cores())
    try:
        run(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"sheet.py: {error}") from error


def run(options: argparse.Namespace) -> None:
    if options.out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out {options.out}: the name must end in {' or '.join(SUFFIXES)}")
    codec = LatentCodec.from_pretrained(options.codec)
    if codec.image_channels != 3:
        raise ValueError(
            f"--codec {options.codec}: a sheet needs colours, and it has {codec.image_channels} channels"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    photographs = (crop_middle(x, KLT_CROP) for x in read(options.klt_images, 8 * codec.downsampling_factor))
    klt = KLT.fit(photographs, codec.downsampling_factor, codec.latent_channels)
    cells: list[Tensor] = []
    too_large = 1.0  # largest JPEG, in bytes of its latent
    for x in drawn() if options.images is None else read(options.images, SIDE):
        seen, excess = versions(x, codec, klt)
        cells, too_large = [*cells, *seen], max(too_large, excess)
    jpeg = "JPEG, same bytes" if too_large == 1 else f"JPEG, up to {too_large:.1f} x bytes"
    latent = f"f{codec.downsampling_factor}c{codec.latent_channels}"
    labels = ("original", report.short_names([options.codec])[0], f"KLT {latent}", jpeg)
    save(image_grid(cells, len(labels)), labels, options.out)
    print(options.out)


def read(folder: Path, smallest: int) -> Iterator[Tensor]:
    """The pictures of a folder [3, H, W] that have at least `smallest` pixels a side."""
    images = FolderImages(folder, 3, smallest)
    yield from (x for _, x in images)
    report.print_left_out(images.left_out)


def versions(x: Tensor, codec: LatentCodec, klt: KLT) -> tuple[list[Tensor], float]:
    """The middle of x [3, H, W]: original, codec, KLT, JPEG, each [3, S, S] of the whole picture coded.

    Beside them the bytes of the JPEG over those of the latent: above 1 where even the lowest quality needs more.
    """
    rows, columns = (-(-side // codec.downsampling_factor) for side in x.shape[1:])
    most_bytes = rows * columns * codec.latent_channels
    jpeg = image_codecs.code(x[None], "JPEG", most_bytes)
    coded = (x[None], reconstruct(codec, x[None]), reconstruct(klt, x[None]), jpeg.image)
    return [crop_middle(y[0], SIDE) for y in coded], jpeg.size / most_bytes


def save(sheet: Tensor, labels: Sequence[str], path: Path) -> None:
    """The grid of pictures with a line of words above its columns."""
    pixels = to_uint8(sheet).permute(1, 2, 0).numpy()
    image = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + LABEL), "white")
    image.paste(Image.fromarray(pixels), (0, LABEL))
    pen = ImageDraw.Draw(image)
    for column, label in enumerate(labels):
        pen.text((column * pixels.shape[1] / len(labels) + 2, 2), label, "black", ImageFont.load_default(12))
    image.save(path, lossless=True)


# ---- what is drawn


def drawn() -> Iterator[Tensor]:
    """Leaves, text, line art and a screen: [3, S, S] each."""
    leaves = np.asarray(draw_leaves(np.random.default_rng(3))).clip(0, 255).astype(np.uint8)
    yield crop_middle(from_uint8(torch.from_numpy(leaves)).permute(2, 0, 1), SIDE)
    for draw in (draw_letters, draw_lines, draw_screen):
        page = Image.new("RGB", (SIDE, SIDE), "white")
        draw(ImageDraw.Draw(page))
        yield from_uint8(torch.from_numpy(np.array(page))).permute(2, 0, 1)


def draw_letters(pen: ImageDraw.ImageDraw) -> None:
    """Dark text on white, of 8, 10, 12 and 16 pixels."""
    top = 4
    for size in (8, 10, 12, 16):
        for line in LINES[:3]:
            pen.text((4, top), line, (20, 20, 40), ImageFont.load_default(size))
            top += round(1.3 * size)


def draw_lines(pen: ImageDraw.ImageDraw) -> None:
    """Ink on white: rays, rings, hatching and a wave, of one and two pixels."""
    for angle in range(0, 360, 12):
        x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        pen.line((48 + 8 * x, 48 + 8 * y, 48 + 42 * x, 48 + 42 * y), "black", 1)
    for radius in range(4, 44, 6):
        pen.ellipse(
            (144 - radius, 48 - radius, 144 + radius, 48 + radius), outline="black", width=1 + radius % 4 // 2
        )
    for offset in range(0, 84, 5):
        pen.line((6 + offset, 104, 6, 104 + offset), "black", 1)
        pen.line((6 + offset, 186, 90, 102 + offset), "black", 1)
    wave = [(100 + x, 144 + 36 * math.sin(x / 9) * math.exp(-x / 60)) for x in range(88)]
    pen.line(wave, "black", 2)


def draw_screen(pen: ImageDraw.ImageDraw) -> None:
    """A window with a bar, buttons, a list and a chart, flat colours and one shade."""
    pen.rectangle((0, 0, SIDE, 24), (36, 41, 60))
    pen.text((8, 6), "Report", "white", ImageFont.load_default(12))
    for place, colour in enumerate(((255, 95, 87), (254, 188, 46), (40, 200, 64))):
        pen.ellipse((140 + 16 * place, 7, 150 + 16 * place, 17), colour)
    for row, words in enumerate(("Inbox 13", "Drafts", "Sent 2468", "Archive")):
        pen.rectangle((0, 26 + 20 * row, 70, 44 + 20 * row), (220, 230, 250) if row == 1 else (246, 246, 248))
        pen.text((6, 29 + 20 * row), words, (30, 30, 30), ImageFont.load_default(11))
    for x in range(76, 188):
        shade = round(255 * (x - 76) / 112)
        pen.line((x, 30, x, 50), (shade, 120, 255 - shade))
    for bar, height in enumerate((18, 42, 30, 60, 51)):
        pen.rectangle((84 + 20 * bar, 120 - height, 96 + 20 * bar, 120), (66, 133, 244))
    pen.line((76, 121, 188, 121), (120, 120, 120))
    pen.rounded_rectangle((20, 146, 88, 172), 6, (26, 115, 232))
    pen.text((36, 152), "Save as", "white", ImageFont.load_default(11))
    pen.rounded_rectangle((104, 146, 172, 172), 6, outline=(120, 120, 120))
    pen.text((122, 152), "Cancel", (60, 60, 60), ImageFont.load_default(11))


if __name__ == "__main__":
    main()
