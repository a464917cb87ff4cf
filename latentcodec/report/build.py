"""From a result to its files: which page a kind of result has, and writing both."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentcodec.files import write_whole
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
from latentcodec.report.results import finite, free_stem, write_json


def build_page(data: Mapping[str, Any]) -> Page:
    """The page of a result. Raises ValueError naming a kind that has none."""
    match data["bench"]:
        case "classic_vae":
            return classic.build(data)
        case "compare":
            return comparison.build(data)
        case "diffusability":
            return diffusability.build(data)
        case "inspect":
            return inspection.build(data)
        case "rate_distortion":
            return rate_distortion.build(data)
        case "reconstruction":
            return reconstruction.build(data)
        case "robustness":
            return robustness.build(data)
        case "throughput":
            return throughput.build(data)
        case "training":
            return training.build(data)
        case kind:
            raise ValueError(f"there is no page for results of kind {kind!r}")


def write_result(data: Mapping[str, Any], out: Path, name: str) -> dict[str, str]:
    """Write the result and its page into `out`, made where missing, under a name that is free; their paths by suffix.

    The page is made from what the JSON file holds, so that it can be made again. Raises OSError where the disk refuses.
    """
    name = free_stem(out, name)
    data = finite(data)
    write_json(data, out / f"{name}.json")
    write_whole(out / f"{name}.html", build_page(data).render().encode())
    return {suffix: str(out / f"{name}.{suffix}") for suffix in ("json", "html")}
