"""The page and the table of `bench/robustness.py`: what a codec's latents bear on their way to the decoder."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from latentcodec.report.page import Page
from latentcodec.report.plots import panel, plot_style, series
from latentcodec.report.results import number, origin_facts

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
            _card(own["int8"] - own["none"], "from rounding the latents to 8 bits", 3),
            _card(own["noise 0.1"] - own["none"], "from noise of a tenth of their deviation", 2),
            (f"{own['half-size latents']:.2f} dB", "of latents scaled to half, against the halved image"),
        ]
    )
    page.table(*table(data), caption=CAPTION)
    page.plot(
        _noise(data),
        "The steeper the curve, the more a generator's errors are seen.",
        f"PSNR by the deviation of the noise, from {own['none']:.2f} dB without",
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
    "Changes are against the first row, or against half-size image. The KLT, a linear transform of single blocks, is "
    "the reference."
)


def _card(loss: float, meaning: str, digits: int) -> tuple[str, str, str]:
    level = "healthy" if loss > -SMALL else "failure" if loss < -LARGE else "warning"
    return f"{loss:+.{digits}f} dB", meaning, level


def table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, for the page and for the terminal."""
    own, linear = data["psnr"], data["klt_psnr"]
    rows = []
    for name in own:
        reference = "half-size image" if name.startswith("half") else "none"
        losses = [f"{scores[name] - scores[reference]:+.3f}" for scores in (own, linear)]
        rows.append([name, number(own[name], 2), losses[0], number(linear[name], 2), losses[1]])
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
