"""Latents of one cell on a page: a map of the codes, draws of N(0, I), traversals and straight lines between codes."""

from collections.abc import Mapping
from typing import Any

from latentcodec.report.inspection import GRID, SPAN
from latentcodec.report.page import Page
from latentcodec.report.plots import SERIES


def add_space(page: Page, space: Mapping[str, Any], zoom: int) -> None:
    """The section of `space`, as `inspection.inspect_codec` makes it; a pixel is `zoom` pixels of the screen."""
    page.section("Space", "Latents without a place: every image is one point.")
    names = space["label_names"]
    colours = [SERIES[k % len(SERIES)] for k in range(max(len(names), 1))]
    points = [
        {"x": round(x, 3), "y": round(y, 3), "colour": colours[k], "label": names[k] if names else ""}
        for x, y, k in space["points"]
    ]
    a, b = space["axes"]
    caption = (
        f"Channels {a} and {b}, those that the decoder needs most, from -3 to 3; the others at their means. Point at "
        "the map to see what lies there."
    )
    page.atlas(space["sheet"], points, dict(zip(names, colours, strict=False)), GRID, SPAN, caption)
    zoom = max(1, zoom // 2)  # these are sheets of many pictures
    page.pictures([(space["draws"], "draws of N(0, I)")], "Decoded draws: what sampling would give.", zoom)
    page.pictures([(space["data"], "images")], "Images, to compare them with.", zoom)
    page.pictures(
        [tuple(p) for p in space["traversals"]], "One channel moved, the others at their means.", zoom
    )
    page.pictures([tuple(p) for p in space["interpolations"]], "Straight lines between codes.", zoom)
