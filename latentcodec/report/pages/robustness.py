"""The page and the table of `bench/robustness.py`: what a codec's latents bear on their way to the decoder."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from latentcodec.report.page import Page
from latentcodec.report.plots import panel, plot_style, series
from latentcodec.report.results import decibels, origin_facts, signed

SMALL, LARGE = 0.02, 0.5  # dB: a loss below the first is good, one above the second bad
NOISE = "noise "  # before the deviation, in the names of the disturbances


def build(data: Mapping[str, Any]) -> Page:
    """The page of a result of kind "robustness"."""
    own = data["psnr"]
    page = Page(
        "What the latents bear",
        f"{data['codec']}, {data['latent']}, on {data['images']} images of {data['folder']}: its latents are "
        "rounded to 8 bits, given noise, or scaled to half their size, and then decoded.",
    )
    page.headline(
        [
            _card(_change(own, "int8"), "from rounding the latents to 8 bits", 3),
            _card(_change(own, "noise 0.1"), "from noise of a tenth of their deviation", 2),
            (
                f"{decibels(own['half-size latents'])} dB",
                "of latents scaled to half, against the halved image",
            ),
        ]
    )
    page.table(*table(data), caption=CAPTION)
    page.plot(
        _noise(data),
        "The steeper the curve, the more a generator's errors are seen.",
        f"PSNR by the deviation of the noise, from {decibels(own['none'])} dB without",
    )
    if data.get("strips"):
        page.section(
            "In pictures",
            "The middle 256 x 256 pixels of the first images, one pixel of the screen for each.",
        )
        for strip in data["strips"]:
            page.pictures([tuple(picture) for picture in strip], "")
    page.section("How it was measured", "The configuration of this run, for whoever repeats it.")
    page.facts(
        {"images": f"{data['images']} of {data['folder']}; {data['skipped']} skipped", **origin_facts(data)}
    )
    return page


CAPTION = (
    "Noise is gaussian, its deviation in units of the latents' own, which is 1. int8: 256 levels from the smallest to "
    "the largest value of each channel of an image, or of each block of 16 x 16 cells of it. Half-size latents are "
    "decoded and compared with the halved image; half-size image is what the codec makes of the halved image itself. "
    "Changes are against the first row, or against half-size image; there is none where either PSNR is infinite, as "
    "that of a picture that came back unchanged. The KLT, a linear transform of single blocks, is the reference."
)


def _change(scores: Mapping[str, float | None], name: str) -> float | None:
    """dB against what was not disturbed; None where either is infinite: a picture came back unchanged."""
    value, reference = scores[name], scores["half-size image" if name.startswith("half") else "none"]
    if value is None or reference is None or math.isinf(value) or math.isinf(reference):
        return None
    return value - reference


def _card(change: float | None, meaning: str, digits: int) -> tuple[str, str, str]:
    if change is None:
        return "-", f"{meaning}: no number, since a picture came back unchanged", ""
    level = "healthy" if change > -SMALL else "failure" if change < -LARGE else "warning"
    return f"{signed(change, digits)} dB", meaning, level


def table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, for the page and for the terminal."""
    own, linear = data["psnr"], data["klt_psnr"]
    rows = []
    for name in own:
        pairs = [(decibels(scores[name]), signed(_change(scores, name), 3)) for scores in (own, linear)]
        rows.append([name, *pairs[0], *pairs[1]])
    return ["latents", "PSNR dB", "change", "KLT dB", "KLT change"], rows


def _noise(data: Mapping[str, Any]) -> Figure:
    with plot_style():
        figure, axes = panel(xlabel="deviation of the noise", ylabel="PSNR, dB")
        for index, (key, label) in enumerate((("psnr", data["codec"]), ("klt_psnr", "its KLT"))):
            noises = [name for name in data[key] if name.startswith(NOISE)]
            values = [data[key]["none"], *(data[key][name] for name in noises)]
            axes.plot(
                [0.0, *(float(name.removeprefix(NOISE)) for name in noises)],
                values,
                label=label,
                **series(index),
            )
        axes.legend()
    return figure
