"""One self-contained HTML page, put together from blocks and rendered by the templates beside this file.

A page has no reference to anything outside: plots are inline SVG, pictures lossless WebP inside the page, style and
script are in it. It follows the reader's light or dark theme and is one column on a narrow screen. Every table, plot
and picture carries a sentence that says what it means. What is measured, and how, is the business of `bench/` and
`quality/`; which blocks a kind of result gets, of `pages/`.

Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor

from latentcodec.printable import printable
from latentcodec.report.pictures import webp
from latentcodec.report.plots import inline_svg
from latentcodec.report.results import numeric_columns

LEVELS = {  # word and icon of each; the colours are in the style sheet
    "healthy": ("Healthy", "\u2714"),
    "warning": ("Warning", "\u25b2"),
    "failure": ("Failure", "\u2716"),
    "note": ("Note", "\u2139"),
}
Picture = tuple[Tensor | str, str]
"""A picture [C, H, W] in [-1, 1], or its data URL, and the label under it."""

_templates = Environment(
    loader=PackageLoader("latentcodec.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.globals["levels"] = LEVELS


@dataclass
class Page:
    """One page, written from top to bottom."""

    title: str
    lead: str
    """What was measured and the main result, in one or two sentences."""
    blocks: list[dict[str, Any]] = field(default_factory=list)
    pictures_by_name: dict[str, str] = field(default_factory=dict)
    """Data URLs that viewers show, each once in the page."""

    def headline(self, numbers: Sequence[tuple[str, str] | tuple[str, str, str]]) -> None:
        """The few (number, meaning) that somebody who reads nothing else should see.

        A third entry, "healthy", "warning" or "failure", says whether the number is good; without it, it has no colour.
        """
        cards = [{"number": card[0], "meaning": card[1], "level": (*card, "")[2]} for card in numbers]
        self._add("headline", cards=cards)

    def verdicts(self, cards: Sequence[Mapping[str, Any]]) -> None:
        """Big answers: title, level and reasons (texts with their own level and cure) of each."""
        self._add("verdicts", cards=cards)

    def scales(self, lines: Sequence[Mapping[str, Any]], caption: str) -> None:
        """Measures on scales with known codecs, as `scales.lines` gives them."""
        self._add("scales", lines=lines, caption=caption)

    def section(self, heading: str, text: str) -> None:
        """A heading and the paragraph that says what follows."""
        self._add("section", heading=heading, text=text)

    def facts(self, facts: Mapping[str, Any]) -> None:
        """A list of names and values: the configuration and the machine."""
        self._add("facts", facts={name: str(value) for name, value in facts.items()})

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        caption: str,
        fold: str | None = None,
        tones: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """A table of formatted cells; `fold` hides a long one behind that line until it is opened.

        `tones`: for each cell "", "better" or "worse", which get a colour and a sign that needs none.
        """
        self._add(
            "table",
            header=header,
            rows=rows,
            numeric=numeric_columns(rows, len(header)),
            caption=caption,
            fold=fold,
            tones=tones or [[""] * len(header) for _ in rows],
        )

    def plot(self, figure: Figure, caption: str, sentence: str | None = None) -> None:
        """One panel; `sentence` is its name for those who cannot see it, by default the caption."""
        self.plots([(figure, sentence or caption)], caption)

    def plots(self, figures: Sequence[tuple[Figure, str]], caption: str) -> None:
        """Panels side by side, or one below the other where the screen is narrow; each with its sentence."""
        number = len(self.blocks)
        svgs = [
            Markup(inline_svg(figure, sentence, f"plot{number}-{place}-"))
            for place, (figure, sentence) in enumerate(figures)
        ]
        self._add("plots", svgs=svgs, caption=caption)

    def pictures(self, pictures: Sequence[Picture], caption: str, zoom: int = 1) -> None:
        """A row of pictures that wraps; a pixel of a picture is `zoom` pixels of the screen, whatever its density.

        0: two on a wide screen, one on a narrow one.
        """
        shown = [
            {"src": picture if isinstance(picture, str) else webp(picture), "label": label}
            for picture, label in pictures
        ]
        self._add("pictures", pictures=shown, caption=caption, zoom=zoom)

    def viewer(
        self, samples: Sequence[Mapping[str, Any]], pictures: Mapping[str, str], caption: str, zoom: int = 0
    ) -> None:
        """Two pictures compared by slider, flicker and difference, zoomed pixel by pixel.

        samples: each a `label` and `choices`, a list of {"label", "picture"} whose first is the original; `pictures`:
        data URLs by name. `zoom`: at first, 1, 2, 4 or 8; 0: 2 on a wide screen and 1 on a narrow one.
        """
        self.pictures_by_name |= pictures
        self._add("viewer", samples=samples, caption=caption, zoom=zoom)

    def atlas(
        self,
        src: str,
        points: Sequence[Mapping[str, Any]],
        legend: Mapping[str, str],
        grid: int,
        span: float,
        caption: str,
    ) -> None:
        """A map of 2-D codes over a sheet of grid x grid decoded tiles from -span to span; hovering shows a tile.

        points: x, y, colour and label of each; legend: label -> colour.
        """
        self._add("atlas", src=src, points=points, legend=legend, grid=grid, span=span, caption=caption)

    def links(self, links: Mapping[str, str]) -> None:
        """Files beside this one, by what they are called."""
        self._add("links", links=_addresses(links))

    def link_first(self, links: Mapping[str, str]) -> None:
        """Files beside this one, by what they are called, above everything else; nothing where there are none."""
        if links:
            self.blocks.insert(0, {"kind": "links", "links": _addresses(links)})

    def render(self) -> str:
        """The whole document."""
        return printable(_templates.get_template("page.html").render(page=self))

    def _add(self, kind: str, **content: Any) -> None:
        self.blocks.append({"kind": kind, **content})


def _addresses(links: Mapping[str, str]) -> dict[str, str]:
    """Paths as an address takes them: a # or a % in the name of a file would lead elsewhere."""
    return {name: quote(os.fsencode(path)) for name, path in links.items()}
