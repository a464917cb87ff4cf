"""Bits against decibels: a codec's latents in several precisions, beside JPEG, WebP and AVIF at several qualities.

    python bench/rate_distortion.py --codec CODEC [CODEC ...] --images FOLDER --out FOLDER

Prints a table, writes a JSON file and an HTML page, and ends stdout with one line of JSON. PSNR by the protocol of
`latentcodec.quality.metrics.evaluate`: 8-bit images, all channels, the mean over whole images.

Shapes: C channels, H W pixels, f downsampling factor, c latent channels.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from latentcodec.codec import LatentCodec
from latentcodec.machine import use_cores
from latentcodec.pixels import from_uint8, to_uint8
from latentcodec.quality import image_codecs
from latentcodec.quality.decoder_measures import decibels
from latentcodec.quality.rate import ROUNDINGS
from latentcodec.report import results as report
from latentcodec.report.build import write_result
from latentcodec.report.pages.rate_distortion import table
from latentcodec.sources.folders import FolderImages, ImageFiles

RATES = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0)  # bits a pixel that the image formats are given


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    report.print_threads(use_cores())
    try:
        run(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"rate_distortion.py: {error}") from error


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--codec", nargs="+", required=True, help="folder, hub id or bundled name; several are compared")
    add("--images", type=Path, required=True, help="folder of images; one that cannot be read is skipped")
    add("--out", type=Path, required=True, help="folder for the JSON and the HTML file")
    add("--formats", nargs="*", choices=image_codecs.available(), default=image_codecs.available(),
        help="image formats beside it (%(default)s)")  # fmt: skip
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="(%(default)s)")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    report.require_folder(options.out)
    names = report.short_names(options.codec)
    codecs = {
        name: LatentCodec.from_pretrained(source, device=options.device)
        for name, source in zip(names, options.codec, strict=True)
    }
    several = {codec.image_channels for codec in codecs.values()}
    if several != {3}:
        raise ValueError(f"--codec: the image formats are made for 3 channels, not {sorted(several)}")
    found = FolderImages(options.images, channels=3)
    images = found.usable()
    report.print_left_out(found.left_out)
    curves = {name: codec_points(codec, images, name) for name, codec in codecs.items()}
    for form in options.formats:
        curves[form] = format_points(form, images)
    data: dict[str, Any] = {
        "bench": "rate_distortion",
        **report.provenance(torch.device(options.device)),
        "folder": report.short_path(str(options.images)),
        "images": len(images),
        "skipped": [item.reason for item in found.left_out],
        "codecs": [{"codec": name, "fingerprint": codec.fingerprint} for name, codec in codecs.items()],
        "curves": curves,
    }
    report.print_table(*table(data))
    name = report.stem(options.codec, data["hardware"], "rate-distortion")
    files = write_result(data, options.out, name)
    print("\n".join(["", *files.values()]))
    report.print_last_line(data | {"files": files})


@torch.inference_mode()
def codec_points(codec: LatentCodec, images: ImageFiles, name: str) -> list[dict[str, Any]]:
    """A point for each precision: bits a pixel, PSNR, and what it is called."""
    found: dict[str, list[tuple[float, float]]] = {rounding: [] for rounding in ROUNDINGS}
    for image in tqdm(images, desc=name, unit="image"):
        x = image[None]
        z, pixels = codec.encode(x).cpu(), x.shape[-2] * x.shape[-1]
        for rounding, change in ROUNDINGS.items():
            rounded, bits = change(z)
            y = from_uint8(to_uint8(codec.decode(rounded, size=(x.shape[-2], x.shape[-1])).cpu()))
            found[rounding].append((bits * z.numel() / pixels, decibels(x, y).item()))
    return [point(rounding, values) for rounding, values in found.items()]


def format_points(form: str, images: ImageFiles) -> list[dict[str, Any]]:
    """A point for each of `RATES`, where the format can be as small."""
    found: dict[float, list[tuple[float, float]]] = {rate: [] for rate in RATES}
    for image in tqdm(images, desc=form, unit="image"):
        x = image[None]
        pixels = x.shape[-2] * x.shape[-1]
        for rate in RATES:
            coded = image_codecs.code(x, form, int(rate * pixels / 8))
            if coded.size * 8 <= rate * pixels:
                found[rate].append((8 * coded.size / pixels, decibels(x, coded.image).item()))
    return [
        point(f"at most {rate:g} bits", values)
        for rate, values in found.items()
        if len(values) == len(images)
    ]


def point(label: str, values: Sequence[tuple[float, float]]) -> dict[str, Any]:
    rates, scores = zip(*values, strict=True)
    return {"label": label, "bits_per_pixel": fmean(rates), "psnr": fmean(scores)}


if __name__ == "__main__":
    main()
