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
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from latentcodec.codec import LatentCodec
from latentcodec.machine import use_cores
from latentcodec.pixels import crop_middle
from latentcodec.quality.decoder_measures import int8, int8_in_blocks
from latentcodec.quality.klt import KLT
from latentcodec.quality.metrics import Codec, evaluate, reconstruct
from latentcodec.report import results as report
from latentcodec.report.build import write_result
from latentcodec.report.pages.robustness import table
from latentcodec.report.pictures import webp
from latentcodec.sources.folders import FolderImages, ImageFiles

NOISES = (0.05, 0.1, 0.2, 0.4)  # deviations of the noise, in units of the latents' own
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


def noisy(z: Tensor, deviation: float) -> Tensor:
    """z plus gaussian noise, the same in every call."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    return z + deviation * noise.to(z)


def half(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, H // 2, W // 2], bilinear without smoothing, which at one half is the mean of four."""
    return F.interpolate(x, scale_factor=0.5, mode="bilinear")


def measure(codec: Codec, images: ImageFiles | Sequence[Tensor], f: int, what: str) -> dict[str, float]:
    """Mean PSNR in dB on `images` [C, H, W], which are looped over again and again, by what was done to the latents."""
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
    small, latents = [], []
    for image in images:
        whole = even_cells(image, f)[None]
        halved = half(whole)[0]
        small.append(evaluate(codec, [halved]).mean("psnr"))
        latents.append(evaluate(Halved(codec, whole), [halved]).mean("psnr"))
    rows["half-size image"] = sum(small) / len(small)
    rows["half-size latents"] = sum(latents) / len(latents)
    return rows


def even_cells(image: Tensor, f: int) -> Tensor:
    """[C, H, W] cropped to an even number of latent cells a side."""
    height, width = (side // (2 * f) * 2 * f for side in image.shape[-2:])
    return image[:, :height, :width]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    report.print_threads(use_cores())
    try:
        run(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"robustness.py: {error}") from error


def run(options: argparse.Namespace) -> None:
    report.require_folder(options.out)
    codec = LatentCodec.from_pretrained(options.codec)
    f, c = codec.downsampling_factor, codec.latent_channels
    smallest = 2 * max(f, 16)  # halves hold SSIM's window
    folder = FolderImages(options.images, codec.image_channels, smallest)
    images = folder.usable()
    report.print_left_out(folder.left_out)
    klt = KLT.fit(images, f, c)
    own, linear = measure(codec, images, f, options.codec), measure(klt, images, f, "its KLT")
    data: dict[str, Any] = {
        "bench": "robustness",
        **report.provenance(torch.device("cpu")),
        "codec": report.short_path(options.codec),
        "fingerprint": codec.fingerprint,
        "latent": f"f{f}c{c}",
        "folder": report.short_path(str(options.images)),
        "images": len(images),
        "skipped": len(folder.left_out),
        "psnr": own,
        "klt_psnr": linear,
    }
    report.print_table(*table(data))
    print(f"\n{len(images)} images; KLT fitted on them")
    name = report.stem([options.codec], data["hardware"], "robustness")
    strips = [pictures(codec, even_cells(image, f)[None]) for image in islice(images, SHOWN)]
    files = write_result(data | {"strips": strips}, options.out, name)
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


# --- the pictures of the page


def pictures(codec: LatentCodec, x: Tensor) -> list[list[str]]:
    """x [1, C, H, W] -> data URLs of its middle 256 x 256 pixels or fewer, each with its label."""
    disturbed = Disturbed(codec, lambda z: noisy(z, NOISES[1]))
    shown = [
        (x, "input"),
        (reconstruct(codec, x), "as it is"),
        (reconstruct(disturbed, x), f"noise {NOISES[1]}"),
        (reconstruct(Halved(codec, x), half(x)), "half-size latents"),
    ]
    return [[webp(crop_middle(picture, WINDOW)[0, :3]), label] for picture, label in shown]


if __name__ == "__main__":
    main()
