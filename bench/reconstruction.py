"""How much of an image survives a codec: PSNR, SSIM and LPIPS beside the linear KLT of the same latent size.

    python bench/reconstruction.py --codec CODEC [CODEC ...] --images FOLDER --out FOLDER

CODEC is whatever `LatentCodec.from_pretrained` takes: a folder, a hub id, a bundled name. Prints a table,
writes a JSON file and an HTML page with plots and the worst images, and ends stdout with one line of JSON:
the same numbers without those of single images. The protocol is that of `latentcodec.quality.metrics.evaluate`.

Shapes: C channels, H W pixels, f downsampling factor, c latent channels.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor
from tqdm import tqdm

from latentcodec.codec import LatentCodec
from latentcodec.files import printable
from latentcodec.machine import use_cores
from latentcodec.pixels import UnreadableImage, find_images, load_image
from latentcodec.quality.klt import KLT
from latentcodec.quality.metrics import SSIM_WINDOW, Evaluation, Metric, evaluate, lpips_metric, reconstruct
from latentcodec.quality.perceptual import SMALLEST_SIDE
from latentcodec.report import page as report

PROTOCOL = (
    "posterior mode, whole images, clamped and rounded to 8 bits; PSNR over all channels of an image; "
    "SSIM with a gaussian window of 11 taps and sigma 1.5 for each channel, windows inside the image; "
    "LPIPS on the same 8-bit images; a mean is a mean over images"
)
WORST_IMAGES = 3  # shown of each codec
WINDOW = 256  # pixels a side of what is shown of them


@dataclass(frozen=True)
class Inputs:
    """Everything a command line can have wrong, opened before anything is measured."""

    codecs: dict[str, LatentCodec]
    """By source, in the order given."""
    images: list[Path]
    skipped: list[dict[str, str]]
    """file and reason."""
    klts: dict[tuple[int, int], KLT]
    """By (f, c)."""
    klt_note: str
    lpips: Metric | None
    lpips_note: str


@dataclass(frozen=True)
class Result:
    """A codec and its KLT on the same images."""

    source: str
    codec: LatentCodec
    klt: KLT
    scores: Evaluation
    klt_scores: Evaluation

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
    results = [measure(source, codec, inputs) for source, codec in inputs.codecs.items()]
    data = summary(results, inputs, options)
    report.print_table(*table(data["codecs"]))
    print(f"\n{len(inputs.images)} images; {inputs.lpips_note}; KLT fitted on {inputs.klt_note}")
    for entry in inputs.skipped:
        print(printable(f"skipped {entry['reason']}"))
    single = {result.source: image_scores(result, inputs.images) for result in results}
    name = report.stem(options.codec, data["hardware"], "reconstruction")
    files = report.write(build_page(results, inputs, data), data | {"images": single}, options.out, name)
    print("\n".join(files.values()))
    report.print_last_line(data | {"files": files})


# --- measuring


def open_inputs(options: argparse.Namespace) -> Inputs:
    """Raises `ValueError` or `OSError` naming the codec, folder or file that cannot be used."""
    paths = find_images(options.images)
    lpips, lpips_note = open_lpips(options.lpips_net, options.lpips_weights)
    dtype = getattr(torch, options.dtype)
    codecs = {
        source: LatentCodec.from_pretrained(source, device=options.device, dtype=dtype)
        for source in options.codec
    }
    several = {codec.image_channels for codec in codecs.values()}
    if len(several) > 1:
        raise ValueError(f"--codec: on one page all take the same image channels, not {sorted(several)}")
    (channels,) = several
    smallest = SSIM_WINDOW if lpips is None else max(SSIM_WINDOW, SMALLEST_SIDE[options.lpips_net])
    images, skipped = readable(paths, channels, smallest)
    if options.klt_images is None:
        klt_images = images
        klt_note = "the evaluated images themselves, which it knows and the codec need not"
    else:
        klt_images, _ = readable(find_images(options.klt_images), channels, smallest=1)
        klt_note = f"{len(klt_images)} images of {options.klt_images}"
    klts = {}
    for f, c in {(codec.downsampling_factor, codec.latent_channels) for codec in codecs.values()}:
        klts[f, c] = KLT.fit(load_all(klt_images, channels, f"fitting the KLT f{f}c{c}"), f, c)
    return Inputs(codecs, images, skipped, klts, klt_note, lpips, lpips_note)


def open_lpips(net: str, weights: Path | None) -> tuple[Metric | None, str]:
    """The metric and how it was had, or None and why not; weights that were named must load."""
    if net == "none":
        return None, "LPIPS not measured: --lpips_net none"
    try:
        return lpips_metric(net, weights), f"LPIPS with {net}, weights: {weights or 'torchvision'}"
    except ValueError as error:
        if weights is not None:
            raise
        return None, f"LPIPS not measured: {error}"


def readable(paths: Sequence[Path], channels: int, smallest: int) -> tuple[list[Path], list[dict[str, str]]]:
    """The images that can be scored, and file and reason of the others. Raises `ValueError` if all are."""
    good, skipped = [], []
    for path in tqdm(paths, desc="reading images", leave=False):
        try:
            height, width = load_image(path, channels).shape[-2:]
            if min(height, width) < smallest:
                raise UnreadableImage(
                    f"{path}: {height} x {width} pixels; the metrics need {smallest} a side"
                )
            good.append(path)
        except UnreadableImage as error:
            skipped.append({"file": str(path), "reason": str(error)})
    if not good:
        raise ValueError(f"none of the {len(paths)} images can be used; the first: {skipped[0]['reason']}")
    return good, skipped


def load_all(paths: Sequence[Path], channels: int, what: str) -> Iterator[Tensor]:
    """Each image as [C, H, W], under a progress bar."""
    for path in tqdm(paths, desc=what, unit="image"):
        yield load_image(path, channels)[0]


def measure(source: str, codec: LatentCodec, inputs: Inputs) -> Result:
    klt = inputs.klts[codec.downsampling_factor, codec.latent_channels]
    scores = evaluate(codec, load_all(inputs.images, codec.image_channels, source), inputs.lpips)
    klt_scores = evaluate(klt, load_all(inputs.images, codec.image_channels, "its KLT"))
    return Result(source, codec, klt, scores, klt_scores)


# --- the numbers


def summary(results: Sequence[Result], inputs: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "bench": "reconstruction",
        "date": date.today().isoformat(),
        "hardware": report.hardware(torch.device(options.device)),
        "dtype": options.dtype,
        "protocol": PROTOCOL,
        "folder": str(options.images),
        "evaluated": len(inputs.images),
        "skipped": inputs.skipped,
        "klt_fitted_on": inputs.klt_note,
        "lpips": inputs.lpips_note,
        "codecs": [codec_summary(result) for result in results],
    }


def codec_summary(result: Result) -> dict[str, Any]:
    own, klt = result.scores, result.klt_scores
    return {
        "codec": result.source,
        "latent": result.latent,
        "floats_per_pixel": result.klt.latent_channels / result.klt.downsampling_factor**2,
        "parameters": sum(parameter.numel() for parameter in result.codec.vae.parameters()),
        "psnr": {"mean": own.mean("psnr"), "min": min(own.values("psnr"))},
        "ssim": {"mean": own.mean("ssim"), "min": min(own.values("ssim"))},
        "lpips": {"mean": own.mean("lpips"), "max": max(own.values("lpips"))},
        "klt_psnr": {"mean": klt.mean("psnr"), "min": min(klt.values("psnr"))},
        "klt_ssim": {"mean": klt.mean("ssim"), "min": min(klt.values("ssim"))},
        "psnr_over_klt": own.mean("psnr") - klt.mean("psnr"),
    }


def image_scores(result: Result, paths: Sequence[Path]) -> list[dict[str, Any]]:
    pairs = zip(paths, result.scores.images, result.klt_scores.images, strict=True)
    return [{"file": str(path), **asdict(own), "klt_psnr": klt.psnr} for path, own, klt in pairs]


def table(codecs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["codec", "latent", "floats/px", "params M", "PSNR dB", "min", "SSIM", "min", "LPIPS", "max"]
    rows = []
    for entry in codecs:
        cells = [entry["codec"], entry["latent"], report.number(entry["floats_per_pixel"], 4)]
        cells += [report.number(entry["parameters"] / 1e6, 2)]
        cells += [report.number(value, 2) for value in entry["psnr"].values()]
        cells += [report.number(value, 4) for metric in ("ssim", "lpips") for value in entry[metric].values()]
        rows.append([*cells, report.number(entry["klt_psnr"]["mean"], 2), f"{entry['psnr_over_klt']:+.2f}"])
    return [*header, "KLT dB", "vs KLT"], rows


# --- the page


def build_page(results: Sequence[Result], inputs: Inputs, data: dict[str, Any]) -> report.Page:
    page = report.Page(
        "Reconstruction quality",
        f"{', '.join(inputs.codecs)} on {len(inputs.images)} images of {data['folder']}. Beside each codec "
        "stands the KLT: the best that a linear transform of single blocks does with as many latent values, "
        f"fitted on {data['klt_fitted_on']}.",
    )
    page.headline(headline(data["codecs"]))
    page.table(
        *table(data["codecs"]),
        caption="PSNR: signal over error in decibels, more is better, 6 dB halve the error. SSIM: 1 is "
        "equal. LPIPS: distance in the features of a network trained on photographs, 0 is equal. KLT: PSNR "
        "of the linear transform of f x f blocks with the same c numbers for each. floats/px: latent values "
        "per pixel, c / f^2. min and max: the worst image.",
    )
    page.section("Image by image", "A mean hides which images a codec is good at. These two plots do not.")
    page.plot(
        plot_scores(results),
        "Left: the images sorted by PSNR, worst first, each curve by itself; solid is the codec, dashed the "
        "KLT of its latent size. Right: every image once; above the diagonal the codec beats the KLT. "
        "Images that came back unchanged have infinite PSNR and are not drawn.",
    )
    for result in results:
        add_worst(page, result, inputs.images)
    page.section("How it was measured", "The configuration of this run, for whoever repeats it.")
    page.facts(facts(data))
    add_image_tables(page, results, inputs)
    return page


def headline(codecs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """PSNR of each codec; of a single one also the other numbers."""
    if len(codecs) > 1:
        what = "mean PSNR of {codec}, {latent}: {psnr_over_klt:+.2f} dB against the KLT"
        return [(f"{entry['psnr']['mean']:.2f} dB", what.format(**entry)) for entry in codecs]
    (entry,) = codecs
    numbers = [
        (f"{entry['psnr']['mean']:.2f} dB", f"mean PSNR; the worst image has {entry['psnr']['min']:.2f}"),
        (
            f"{entry['psnr_over_klt']:+.2f} dB",
            f"against the linear KLT of the same latent size, {entry['latent']}",
        ),
        (f"{entry['ssim']['mean']:.4f}", "mean SSIM; 1 is equal"),
    ]
    lpips = entry["lpips"]["mean"]
    return numbers if math.isnan(lpips) else [*numbers, (f"{lpips:.4f}", "mean LPIPS; 0 is equal")]


def plot_scores(results: Sequence[Result]) -> Figure:
    with report.plot_style():
        figure = Figure(figsize=(9.6, 4), layout=ConstrainedLayoutEngine(wspace=0.08))
        ranked, against = figure.subplots(1, 2)
        for i, result in enumerate(results):
            colour = report.SERIES[i % len(report.SERIES)]
            own, klt = result.scores.values("psnr"), result.klt_scores.values("psnr")
            places = range(1, len(own) + 1)
            ranked.plot(places, sorted(own), color=colour, marker=".", label=result.source)
            ranked.plot(places, sorted(klt), color=colour, linestyle="--", label=f"KLT {result.latent}")
            against.scatter(klt, own, color=colour, s=16, alpha=0.8)
        ranked.set(xlabel="images, worst first", ylabel="PSNR, dB", title="Sorted")
        ranked.legend()
        low, high = against.get_xlim()
        against.plot([low, high], [low, high], color=report.NEUTRAL, linewidth=1)
        against.set(xlabel="PSNR of the KLT, dB", ylabel="PSNR of the codec, dB", title="Against the KLT")
    return figure


def add_worst(page: report.Page, result: Result, paths: Sequence[Path]) -> None:
    """The images of lowest PSNR: what went in, what came out, what the KLT makes of it, and the error."""
    page.section(
        f"Where {result.source} is worst",
        f"The {min(WORST_IMAGES, len(paths))} images of lowest PSNR, of each the {WINDOW} x {WINDOW} pixels "
        "with the largest error, not resized. In the last picture grey is no error; structure is detail "
        "that the codec lost, an even tint is a shift of colour.",
    )
    psnrs, klt_psnrs = result.scores.values("psnr"), result.klt_scores.values("psnr")
    for i in sorted(range(len(paths)), key=psnrs.__getitem__)[:WORST_IMAGES]:
        x = load_image(paths[i], result.codec.image_channels)
        y, linear = reconstruct(result.codec, x), reconstruct(result.klt, x)
        rows, columns = worst_window((y - x).square().mean(1)[0])
        labels = [
            "input",
            f"codec, {psnrs[i]:.2f} dB",
            f"KLT, {klt_psnrs[i]:.2f} dB",
            "codec - input, times 8",
        ]
        shown = [image[0, :3, rows, columns] for image in (x, y, linear, 8 * (y - x))]
        place = f"{paths[i].name}, from row {rows.start} and column {columns.start}; dB of the whole image."
        page.pictures(list(zip(shown, labels, strict=True)), place)


def worst_window(error: Tensor) -> tuple[slice, slice]:
    """[H, W] squared error -> rows and columns of the window of largest mean; a small image as a whole."""
    height, width = (min(WINDOW, side) for side in error.shape)
    means = F.avg_pool2d(error[None, None], (height, width), stride=8)[0, 0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    return slice(8 * row, 8 * row + height), slice(8 * column, 8 * column + width)


def facts(data: dict[str, Any]) -> dict[str, Any]:
    return {
        "protocol": data["protocol"],
        "images": f"{data['evaluated']} of {data['folder']}; {len(data['skipped'])} skipped",
        "KLT fitted on": data["klt_fitted_on"],
        "LPIPS": data["lpips"],
        "dtype of the codec": data["dtype"],
        **report.machine_facts(data["hardware"]),
        "date": data["date"],
    }


def add_image_tables(page: report.Page, results: Sequence[Result], inputs: Inputs) -> None:
    columns = {"psnr": 2, "ssim": 4, "lpips": 4, "klt_psnr": 2}  # digits
    for result in results:
        entries = image_scores(result, inputs.images)
        page.table(
            ["image", "PSNR dB", "SSIM", "LPIPS", "KLT dB"],
            [
                [Path(e["file"]).name, *(report.number(e[key], n) for key, n in columns.items())]
                for e in entries
            ],
            caption="Every evaluated image, in the order of the file names.",
            fold=f"All {len(entries)} images of {result.source}",
        )
    if inputs.skipped:
        page.table(
            ["skipped file", "reason"],
            [[Path(entry["file"]).name, entry["reason"]] for entry in inputs.skipped],
            caption="These files are in the folder and in none of the numbers.",
        )


if __name__ == "__main__":
    main()
