"""The page and the table of `bench/rate_distortion.py`: bits a pixel against decibels."""

from collections.abc import Mapping
from typing import Any

from latentcodec.quality.image_codecs import HONEST
from latentcodec.report.page import Page
from latentcodec.report.plots import panel, plot_style, series
from latentcodec.report.results import number, origin_facts


def build(data: Mapping[str, Any]) -> Page:
    """The page of a result of kind "rate_distortion"."""
    names = ", ".join(entry["codec"] for entry in data["codecs"])
    page = Page(
        "Rate and distortion",
        f"{names} on {data['images']} images of {data['folder']}: what a latent costs in several precisions, and what "
        "is left of the picture.",
    )
    with plot_style():
        figure, axes = panel((6.4, 4.2), xlabel="bits a pixel", ylabel="PSNR, dB", xscale="log")
        for index, (name, points) in enumerate(data["curves"].items()):
            ordered = sorted(points, key=lambda point: point["bits_per_pixel"])
            rates = [point["bits_per_pixel"] for point in ordered]
            axes.plot(rates, [point["psnr"] for point in ordered], label=name, **series(index))
        axes.legend(fontsize=8)
    page.plot(
        figure,
        f"Means over the images. {HONEST} Steps: the latent rounded to parts of its deviation, its bits the entropy of "
        "each channel of an image, what an ideal entropy coder would take.",
        "PSNR by bits a pixel of " + ", ".join(data["curves"]),
    )
    page.table(*table(data), caption="change: against the first row of the same codec or format.")
    page.section("How it was measured", "The configuration of this run, for whoever repeats it.")
    prints = {f"fingerprint of {entry['codec']}": entry["fingerprint"] for entry in data["codecs"]}
    page.facts({**prints, **origin_facts(data), "skipped": "; ".join(data["skipped"]) or "nothing"})
    return page


def table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, for the page and for the terminal."""
    rows = []
    for name, points in data["curves"].items():
        for point in points:
            change = f"{point['psnr'] - points[0]['psnr']:+.3f}"
            rows.append(
                [name, point["label"], number(point["bits_per_pixel"], 3), number(point["psnr"], 2), change]
            )
    return ["codec", "precision", "bits/px", "PSNR dB", "change"], rows
