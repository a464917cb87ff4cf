"""What a codec's latents bear on their way to the decoder: 8 bits, noise, and being scaled like a picture.

    python bench/robustness.py --codec CODEC --images FOLDER --out FOLDER

Latents are stored in 8 bits, a diffusion model hands over slightly wrong ones, and latents that scale as their image
does are easier to generate (Kouzelis et al. 2025, arXiv:2502.09509). Prints a table, the KLT of the same latent
size beside the codec, writes a JSON file and an HTML page, and ends stdout with one line of JSON. PSNR by the protocol
of `latentcodec.quality.metrics.evaluate`.

Shapes: C channels, H W pixels, h w latent cells, f downsampling factor, c latent channels.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from latentcodec.codec import LatentCodec
from latentcodec.files import printable
from latentcodec.machine import use_cores
from latentcodec.pixels import UnreadableImage, find_images, load_image
from latentcodec.quality.klt import KLT
from latentcodec.quality.metrics import Codec, evaluate, reconstruct
from latentcodec.report import page as report

NOISES = (0.05, 0.1, 0.2, 0.4)  # deviations of the noise, in units of the latents' own
STEPS = 255  # between the 256 levels of 8 bits
BLOCK = 16  # latent cells a side, that share their 256 levels in `int8_in_blocks`
SHOWN = 2  # images on the page
WINDOW = 256  # pixels a side of what is shown of them


@dataclass(frozen=True)
class Disturbed:
    """A codec whose latents are disturbed between encoder and decoder."""

    codec: Codec
    disturb: Callable[[Tensor], Tensor]

    def encode(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, c, h, w]."""
        return self.disturb(self.codec.encode(x))

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """[B, c, h, w] -> [B, C, H, W]."""
        return self.codec.decode(z, size)


@dataclass(frozen=True)
class Halved:
    """A codec that is given an image of half the size, and decodes the halved latents of the whole one."""

    codec: Codec
    whole: Tensor
    """[1, C, 2H, 2W], whose half is asked for."""

    def encode(self, x: Tensor) -> Tensor:
        """[1, C, H, W] -> [1, c, h, w]; x itself is not looked at."""
        return half(self.codec.encode(self.whole))

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """[1, c, h, w] -> [1, C, H, W]."""
        return self.codec.decode(z, size)


def int8(z: Tensor) -> Tensor:
    """z [B, c, h, w] rounded to 256 levels, from the smallest to the largest value of each channel of an image."""
    low, high = z.amin((2, 3), keepdim=True), z.amax((2, 3), keepdim=True)
    step = ((high - low) / STEPS).clamp(min=torch.finfo(z.dtype).tiny)
    return low + ((z - low) / step).round() * step


def int8_in_blocks(z: Tensor) -> Tensor:
    """The same for each block of 16 x 16 cells: two float16 numbers a block, 1.6 % more than the 8 bits themselves."""
    rows = [torch.cat([int8(block) for block in row.split(BLOCK, 3)], 3) for row in z.split(BLOCK, 2)]
    return torch.cat(rows, 2)


def noisy(z: Tensor, deviation: float) -> Tensor:
    """z plus gaussian noise, the same in every call."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    return z + deviation * noise.to(z)


def half(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, H // 2, W // 2], bilinear without smoothing, which at one half is the mean of four."""
    return F.interpolate(x, scale_factor=0.5, mode="bilinear")


def measure(codec: Codec, images: Sequence[Tensor], f: int, what: str) -> dict[str, float]:
    """Mean PSNR in dB on `images` [C, H, W] by what was done to the latents."""
    disturbances: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda z: z,
        "int8": int8,
        "int8 in blocks": int8_in_blocks,
    }
    for deviation in NOISES:
        disturbances[f"noise {deviation}"] = partial(noisy, deviation=deviation)
    rows = {}
    bar = tqdm(disturbances.items(), desc=what, unit="disturbance", leave=False)
    for name, disturb in bar:
        rows[name] = evaluate(Disturbed(codec, disturb), images).mean("psnr")
    wholes = [even_cells(image, f) for image in images]
    halves = [half(whole[None])[0] for whole in wholes]
    pairs = list(zip(wholes, halves, strict=True))
    scores = [evaluate(Halved(codec, whole[None]), [small]).mean("psnr") for whole, small in pairs]
    rows["half-size image"] = evaluate(codec, halves).mean("psnr")
    rows["half-size latents"] = sum(scores) / len(scores)
    return rows


def even_cells(image: Tensor, f: int) -> Tensor:
    """[C, H, W] cropped to an even number of latent cells a side."""
    height, width = (side // (2 * f) * 2 * f for side in image.shape[-2:])
    return image[:, :height, :width]


def open_images(folder: Path, channels: int, f: int) -> tuple[list[Tensor], int]:
    """The images [C, H, W] that can be read and hold two cells a side, and how many were left out."""
    images, paths = [], find_images(folder)
    for path in paths:
        try:
            image = load_image(path, channels)[0]
        except UnreadableImage as error:
            print(printable(f"skipped {error}"))
            continue
        if min(image.shape[-2:]) < 2 * max(f, 16):  # SSIM has a window of 11 pixels
            size = f"{image.shape[-2]} x {image.shape[-1]} pixels"
            print(printable(f"skipped {path}: {size} are too few to halve"))
            continue
        images.append(image)
    if not images:
        raise ValueError(f"none of the {len(paths)} images in {folder} can be used")
    return images, len(paths) - len(images)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    report.print_threads(use_cores())
    try:
        report.require_folder(options.out)
        codec = LatentCodec.from_pretrained(options.codec)
        f, c = codec.downsampling_factor, codec.latent_channels
        images, skipped = open_images(options.images, codec.image_channels, f)
    except (ValueError, OSError) as error:
        raise SystemExit(f"robustness.py: {error}") from error
    klt = KLT.fit(images, f, c)
    own, linear = measure(codec, images, f, options.codec), measure(klt, images, f, "its KLT")
    data: dict[str, Any] = {
        "bench": "robustness",
        "date": date.today().isoformat(),
        "hardware": report.hardware(torch.device("cpu")),
        "codec": options.codec,
        "latent": f"f{f}c{c}",
        "folder": str(options.images),
        "images": len(images),
        "skipped": skipped,
        "psnr": own,
        "klt_psnr": linear,
    }
    report.print_table(*table(data))
    print(f"\n{len(images)} images; KLT fitted on them")
    name = report.stem([options.codec], data["hardware"], "robustness")
    files = report.write(build_page(data, codec, images), data, options.out, name)
    print("\n".join(files.values()))
    report.print_last_line(data | {"files": files})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codec", required=True, help="folder, hub id or bundled name")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON and the HTML file")
    return parser.parse_args(argv)


# --- the page


def table(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    own, linear = data["psnr"], data["klt_psnr"]
    rows = []
    for name in own:
        reference = "half-size image" if name.startswith("half") else "none"
        losses = [f"{scores[name] - scores[reference]:+.3f}" for scores in (own, linear)]
        rows.append([name, report.number(own[name], 2), losses[0], report.number(linear[name], 2), losses[1]])
    return ["latents", "PSNR dB", "change", "KLT dB", "change"], rows


def build_page(data: dict[str, Any], codec: LatentCodec, images: Sequence[Tensor]) -> report.Page:
    own = data["psnr"]
    page = report.Page(
        "What the latents bear",
        f"{data['codec']}, {data['latent']}, on {data['images']} images of {data['folder']}: its latents are "
        "rounded to 8 bits, given noise, or scaled to half their size, and then decoded.",
    )
    page.headline(
        [
            (f"{own['int8'] - own['none']:+.3f} dB", "from rounding the latents to 8 bits"),
            (f"{own['noise 0.1'] - own['none']:+.2f} dB", "from noise of a tenth of their deviation"),
            (f"{own['half-size latents']:.2f} dB", "of latents scaled to half, against the halved image"),
        ]
    )
    page.table(
        *table(data),
        caption="Noise is gaussian, its deviation in units of the latents' own, which is 1. int8: 256 levels "
        "from the smallest to the largest value of each channel of an image, or of each block of 16 x 16 cells of it. "
        "Half-size latents are decoded and "
        "compared with the halved image; half-size image is what the codec makes of the halved image itself. "
        "Changes are against the first row, or against half-size image. The KLT, a linear transform of single "
        "blocks, is the reference.",
    )
    page.plot(plot_noise(data), "The steeper the curve, the more a generator's errors are seen.")
    page.section("In pictures", f"The middle {WINDOW} x {WINDOW} pixels of the first images, not resized.")
    for image in images[:SHOWN]:
        page.pictures(pictures(codec, even_cells(image, codec.downsampling_factor)[None]), "")
    page.section("How it was measured", "The configuration of this run, for whoever repeats it.")
    skipped = f"{data['images']} of {data['folder']}; {data['skipped']} skipped"
    page.facts({"images": skipped, **report.machine_facts(data["hardware"]), "date": data["date"]})
    return page


def plot_noise(data: dict[str, Any]) -> Figure:
    with report.plot_style():
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for key, label, colour in (
            ("psnr", data["codec"], report.OURS),
            ("klt_psnr", "its KLT", report.SECOND),
        ):
            values = [data[key]["none"], *(data[key][f"noise {deviation}"] for deviation in NOISES)]
            axes.plot([0, *NOISES], values, marker="o", color=colour, label=label)
        axes.set(xlabel="deviation of the noise", ylabel="PSNR, dB")
        axes.legend()
    return figure


def pictures(codec: LatentCodec, x: Tensor) -> list[tuple[Tensor, str]]:
    """x [1, C, H, W] -> [C, 256, 256] or smaller, each with its label."""
    disturbed = Disturbed(codec, lambda z: noisy(z, NOISES[1]))
    shown = [
        (x, "input"),
        (reconstruct(codec, x), "as it is"),
        (reconstruct(disturbed, x), f"noise {NOISES[1]}"),
        (reconstruct(Halved(codec, x), half(x)), "half-size latents"),
    ]
    return [(middle(picture)[0, :3], label) for picture, label in shown]


def middle(x: Tensor) -> Tensor:
    """The middle of [B, C, H, W], at most 256 pixels a side."""
    top, left = (max(side - WINDOW, 0) // 2 for side in x.shape[-2:])
    return x[..., top : top + WINDOW, left : left + WINDOW]


if __name__ == "__main__":
    main()
