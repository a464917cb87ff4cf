"""How much of an image survives a codec: PSNR, SSIM, LPIPS, text, colours, round trips, beside KLT, JPEG, WebP, AVIF.

    python bench/reconstruction.py --codec CODEC [CODEC ...] --images FOLDER --out FOLDER

CODEC is whatever `LatentCodec.from_pretrained` takes: a folder, a hub id, a bundled name. Prints a table,
writes a JSON file and an HTML page with plots and crops that are seen through every codec, and ends stdout with one
line of JSON: the same numbers without those of single images. Subfolders of the images, such as faces and line art,
are also scored by themselves. The protocol is that of `latentcodec.quality.metrics.evaluate`.

Shapes: C channels, H W pixels, f downsampling factor, c latent channels.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from latentcodec.codec import LatentCodec
from latentcodec.finite import NotFinite
from latentcodec.machine import use_cores
from latentcodec.pixels import LeftOut, load_image
from latentcodec.quality import image_codecs, text
from latentcodec.quality.fidelity import colour_shift, interval, round_trips
from latentcodec.quality.klt import KLT
from latentcodec.quality.metrics import (
    SSIM_WINDOW,
    Evaluation,
    Metric,
    evaluate,
    lpips_metric,
    psnr,
    reconstruct,
)
from latentcodec.quality.perceptual import SMALLEST_SIDE
from latentcodec.report import results as report
from latentcodec.report.build import write_result
from latentcodec.report.crops import compared_crops
from latentcodec.report.pages.reconstruction import table
from latentcodec.sources.folders import FolderImages

PROTOCOL = (
    "posterior mode, whole images, clamped and rounded to 8 bits; PSNR over all channels of an image; "
    "SSIM with a gaussian window of 11 taps and sigma 1.5 for each channel, windows inside the image; "
    "LPIPS on the same 8-bit images; a mean is a mean over images"
)
BITS = 8  # of each latent value, for the rate
TRIPS_IMAGES = 4  # that make ten round trips


@dataclass(frozen=True)
class Inputs:
    """Everything a command line can have wrong, opened before anything is measured."""

    codecs: dict[str, LatentCodec]
    """By short name, in the order given."""
    images: list[Path]
    left_out: list[LeftOut]
    klts: dict[tuple[int, int], KLT]
    """By (f, c)."""
    klt_note: str
    lpips: Metric | None
    lpips_note: str
    reader: text.Reader | None
    text_note: str


@dataclass(frozen=True)
class Result:
    """A codec and its KLT on the same images."""

    name: str
    """Of the codec, short."""
    codec: LatentCodec
    klt: KLT
    scores: Evaluation
    klt_scores: Evaluation
    rivals: dict[str, list[dict[str, float]]]
    """By image format: psnr and bytes of each image."""
    latent_bytes: list[int]
    """Of each image, at 8 bits a number."""

    @property
    def latent(self) -> str:
        """f8c16: one latent cell for 8 x 8 pixels, 16 numbers in it."""
        return f"f{self.klt.downsampling_factor}c{self.klt.latent_channels}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--codec", nargs="+", required=True, help="folder, hub id or bundled name; several are compared")
    add("--images", type=Path, required=True, help="folder of images; one that cannot be read is skipped")
    add("--out", type=Path, required=True, help="folder for the JSON and the HTML file")
    add("--klt_images", type=Path, help="photographs the KLT is fitted on; default: those of --images")
    add("--lpips_net", choices=("none", *SMALLEST_SIDE), default="vgg", help="network of LPIPS (%(default)s)")
    add("--lpips_weights", type=Path, help="its weights as safetensors; default: torchvision's own")
    add("--rivals", nargs="*", choices=image_codecs.available(), default=image_codecs.available(),
        help="image formats at equal bits; none: --rivals alone (%(default)s)")  # fmt: skip
    add("--text", action="store_true", help="read drawn text by RapidOCR (pip install latentcodec[ocr])")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="(%(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    try:
        run(options)
    except (ValueError, OSError) as error:  # what a user can mend; all else shows its traceback
        raise SystemExit(f"reconstruction.py: {error}") from error


def run(options: argparse.Namespace) -> None:
    report.print_threads(use_cores())
    inputs = open_inputs(options)
    report.require_folder(options.out)
    results = [measure(name, codec, inputs, options.rivals) for name, codec in inputs.codecs.items()]
    data = summary(results, inputs, options)
    report.print_table(*table(data["codecs"]))
    notes = inputs.lpips_note, inputs.text_note, f"KLT fitted on {inputs.klt_note}"
    print(f"\n{len(inputs.images)} images", *notes, sep="; ")
    report.print_left_out(inputs.left_out)
    single = {result.name: image_scores(result, inputs.images, options.images) for result in results}
    shown = compared_crops(
        {r.name: r.codec for r in results},
        {f"KLT {r.latent}": r.klt for r in results},
        inputs.images,
        [r.scores.values("psnr") for r in results],
        options.rivals,
        results[0].latent_bytes,
    )
    name = report.stem(options.codec, data["hardware"], "reconstruction")
    files = write_result(data | {"images": single} | shown, options.out, name)
    print("\n".join(files.values()))
    report.print_last_line(data | {"files": files})


# --- measuring


def open_inputs(options: argparse.Namespace) -> Inputs:
    """Raises `ValueError` or `OSError` naming the codec, folder or file that cannot be used."""
    lpips, lpips_note = open_lpips(options.lpips_net, options.lpips_weights)
    dtype = getattr(torch, options.dtype)
    codecs = {
        name: LatentCodec.from_pretrained(source, device=options.device, dtype=dtype)
        for name, source in zip(report.short_names(options.codec), options.codec, strict=True)
    }
    several = {codec.image_channels for codec in codecs.values()}
    if len(several) > 1:
        raise ValueError(f"--codec: on one page all take the same image channels, not {sorted(several)}")
    (channels,) = several
    smallest = SSIM_WINDOW if lpips is None else max(SSIM_WINDOW, SMALLEST_SIDE[options.lpips_net])
    found = FolderImages(options.images, channels, smallest)
    images = [path for path, _ in found]
    if options.klt_images is None:
        klt_images = images
        klt_note = "the evaluated images themselves, which it knows and the codec need not"
    else:
        klt_images = [path for path, _ in FolderImages(options.klt_images, channels)]
        klt_note = f"{len(klt_images)} images of {report.short_path(str(options.klt_images))}"
    klts = {}
    for f, c in {(codec.downsampling_factor, codec.latent_channels) for codec in codecs.values()}:
        klts[f, c] = KLT.fit(load_all(klt_images, channels, f"fitting the KLT f{f}c{c}"), f, c)
    reader, text_note = open_text(options.text, channels)
    return Inputs(codecs, images, found.left_out, klts, klt_note, lpips, lpips_note, reader, text_note)


def open_lpips(net: str, weights: Path | None) -> tuple[Metric | None, str]:
    """The metric and how it was had, or None and why not; weights that were named must load."""
    if net == "none":
        return None, "LPIPS not measured: --lpips_net none"
    try:
        place = report.short_path(str(weights)) if weights else "torchvision"
        return lpips_metric(net, weights), f"LPIPS with {net}, weights: {place}"
    except ValueError as error:
        if weights is not None:
            raise
        return None, f"LPIPS not measured: {error}"


def open_text(wanted: bool, channels: int) -> tuple[text.Reader | None, str]:
    """The reader of text where it is wanted, and what to say of it. Raises `ValueError` where it is not installed."""
    if not wanted:
        return None, "text not read: no --text"
    if channels not in (1, 3):
        raise ValueError(f"--text: it is drawn in 1 or 3 channels, not {channels}")
    return text.open_reader(), "text read by RapidOCR"


def load_all(paths: Sequence[Path], channels: int, what: str) -> Iterator[Tensor]:
    """Each image as [C, H, W], under a progress bar."""
    for path in tqdm(paths, desc=what, unit="image"):
        yield load_image(path, channels)[0]


def measure(name: str, codec: LatentCodec, inputs: Inputs, formats: Sequence[str]) -> Result:
    klt = inputs.klts[codec.downsampling_factor, codec.latent_channels]
    paths = [str(path) for path in inputs.images]
    try:
        scores = evaluate(codec, load_all(inputs.images, codec.image_channels, name), inputs.lpips, paths)
    except NotFinite as error:
        raise NotFinite(f"{name}: {error}") from error
    klt_scores = evaluate(klt, load_all(inputs.images, codec.image_channels, "its KLT"))
    f, c = codec.downsampling_factor, codec.latent_channels
    rivals: dict[str, list[dict[str, float]]] = {
        form: [] for form in formats if codec.image_channels in (1, 3)
    }
    sizes = []
    for image in load_all(inputs.images, codec.image_channels, "image formats at equal bits"):
        height, width = image.shape[-2:]
        sizes.append(-(-height // f) * -(-width // f) * c * BITS // 8)
        for form, entries in rivals.items():
            coded = image_codecs.code(image[None], form, sizes[-1])
            entries.append({"psnr": psnr(image[None], coded.image).item(), "bytes": coded.size})
    return Result(name, codec, klt, scores, klt_scores, rivals, sizes)


# --- the numbers


def summary(results: Sequence[Result], inputs: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "bench": "reconstruction",
        **report.provenance(torch.device(options.device)),
        "dtype": options.dtype,
        "protocol": PROTOCOL,
        "folder": report.short_path(str(options.images)),
        "evaluated": len(inputs.images),
        "skipped": [{"file": item.path, "reason": item.reason} for item in inputs.left_out],
        "klt_fitted_on": inputs.klt_note,
        "lpips": inputs.lpips_note,
        "text": inputs.text_note,
        "codecs": [codec_summary(result, inputs) for result in results],
    }


def codec_summary(result: Result, inputs: Inputs) -> dict[str, Any]:
    own, klt = result.scores, result.klt_scores
    over = [a - b for a, b in zip(own.values("psnr"), klt.values("psnr"), strict=True)]
    f, c = result.klt.downsampling_factor, result.klt.latent_channels
    first = [load_image(path, result.codec.image_channels) for path in inputs.images[:TRIPS_IMAGES]]
    trips = torch.tensor([round_trips(result.codec, x) for x in first]).mean(0).tolist()
    shifts = [colour_shift(x, reconstruct(result.codec, x)) for x in first]
    channels, legible = result.codec.image_channels, None
    if inputs.reader is not None:
        legible = asdict(text.legibility(lambda x: reconstruct(result.codec, x), channels, inputs.reader))
    return {
        "codec": result.name,
        "fingerprint": result.codec.fingerprint,
        "latent": result.latent,
        "floats_per_pixel": c / f**2,
        "bits_per_pixel": BITS * c / f**2,
        "parameters": sum(parameter.numel() for parameter in result.codec.vae.parameters()),
        "psnr": _spread(own, "psnr", "min"),
        "ssim": _spread(own, "ssim", "min"),
        "lpips": _spread(own, "lpips", "max"),
        "klt_psnr": {"mean": klt.mean("psnr"), "min": min(klt.values("psnr"))},
        "klt_ssim": {"mean": klt.mean("ssim"), "min": min(klt.values("ssim"))},
        "psnr_over_klt": own.mean("psnr") - klt.mean("psnr"),
        "psnr_over_klt_interval": interval(over),
        "rivals": {form: _format_summary(entries, result.latent_bytes) for form, entries in result.rivals.items()},
        "round_trips_psnr": trips,
        "colour_shift_levels": torch.tensor(shifts).mean(0).tolist(),
        "legibility": legible,
    }  # fmt: skip


def _spread(scores: Evaluation, metric: Literal["psnr", "ssim", "lpips"], worst: str) -> dict[str, Any]:
    """Mean, the worst image, and the interval of the mean."""
    values = scores.values(metric)
    extreme = min(values) if worst == "min" else max(values)
    return {"mean": scores.mean(metric), worst: extreme, "interval": interval(values)}


def _format_summary(entries: Sequence[dict[str, float]], sizes: Sequence[int]) -> dict[str, float]:
    """Mean PSNR of a format, and how many images it could not make as small."""
    too_large = sum(entry["bytes"] > size for entry, size in zip(entries, sizes, strict=True))
    return {"psnr": sum(entry["psnr"] for entry in entries) / len(entries), "too_large": too_large}


def image_scores(result: Result, paths: Sequence[Path], folder: Path) -> list[dict[str, Any]]:
    """Of each image, by its path below the folder: names alone may be those of several images."""
    pairs = zip(paths, result.scores.images, result.klt_scores.images, strict=True)
    return [
        {"file": path.relative_to(folder).as_posix(), "group": path.parent.name, **asdict(own), "klt_psnr": klt.psnr}
        for path, own, klt in pairs
    ]  # fmt: skip


if __name__ == "__main__":
    main()
