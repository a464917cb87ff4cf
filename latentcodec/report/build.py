"""From a result to its files: which page a kind of result has, and writing both."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latentcodec.files import write_whole
from latentcodec.finite import finite
from latentcodec.report.page import Page
from latentcodec.report.pages import (
    classic,
    comparison,
    diffusability,
    inspection,
    rate_distortion,
    reconstruction,
    robustness,
    throughput,
    training,
)
from latentcodec.report.results import free_stem, write_json

PAGES: Mapping[str, Callable[[Mapping[str, Any]], Page]] = {
    "classic_vae": classic.build,
    "compare": comparison.build,
    "diffusability": diffusability.build,
    "inspect": inspection.build,
    "rate_distortion": rate_distortion.build,
    "reconstruction": reconstruction.build,
    "robustness": robustness.build,
    "throughput": throughput.build,
    "training": training.build,
}
"""By the kind of a result, its "bench"."""


def build_page(data: Mapping[str, Any]) -> Page:
    """The page of a result. Raises ValueError naming a kind that has none."""
    if data["bench"] not in PAGES:
        raise ValueError(f"there is no page for results of kind {data['bench']!r}")
    return PAGES[data["bench"]](data)


def write_result(data: Mapping[str, Any], out: Path, name: str) -> dict[str, str]:
    """Write the result and its page into `out`, made where missing, under a name that is free; their paths by suffix.

    The page is made from what the JSON file holds, so that it can be made again. Raises OSError where the disk refuses.
    """
    name = free_stem(out, name)
    data = finite(data)
    write_json(data, out / f"{name}.json")
    write_page(data, out, name)
    return {suffix: str(out / f"{name}.{suffix}") for suffix in ("json", "html")}


def write_page(data: Mapping[str, Any], out: Path, name: str) -> Path:
    """Write the page of a result as NAME.html into `out`, with links to its JSON file and to the pages beside it."""
    page, links = build_page(data), {}
    if (out / f"{name}.json").is_file():
        links["the numbers of this page"] = f"{name}.json"
    for other in sorted(out.glob("*.html")):
        if other.stem != name and other.with_suffix(".json").is_file():
            links[other.stem] = other.name
    page.link_first(links)
    write_whole(out / f"{name}.html", page.render().encode())
    return out / f"{name}.html"
