"""Plots as inline SVG that follow the page's theme, with colours and marks that colour-blind readers can tell apart.

Each plot is one panel, 4.8 inches wide: pages lay panels side by side on a wide screen and one below the other on a
narrow one, where a wide plot would shrink until nobody could read it.
"""

import io
import re
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

# INK is a stand-in that becomes the page's text colour; the others have a contrast of 3 on white and on near-black.
INK = "#010203"
OURS, SECOND, THIRD, FOURTH, NEUTRAL = "#2f81f7", "#d55e00", "#00936b", "#a463c7", "#7d8590"
SERIES = (OURS, SECOND, THIRD, FOURTH, NEUTRAL, "#b0760a")
MARKERS = ("o", "s", "^", "D", "v", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
PANEL = (4.8, 3.2)  # inches

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "text.parse_math": False,  # a $ in the name of a codec or folder is a $
    "svg.hashsalt": "latentcodec",  # the same plot gives the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.18,
    "legend.frameon": False,
    **{f"{name}.color": INK for name in ("text", "xtick", "ytick", "grid")},
    **{f"axes.{name}color": INK for name in ("edge", "label", "title")},
}


def plot_style() -> Any:
    """Context manager: figures made inside it look like the page."""
    return matplotlib.rc_context(STYLE)


def panel(size: tuple[float, float] = PANEL, **settings: Any) -> tuple[Figure, Axes]:
    """An empty plot; `settings` are those of `Axes.set`, such as xlabel. To be used inside `plot_style()`."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(**settings)
    return figure, axes


def series(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the `index`-th curve: it can be told by any of the three."""
    return {
        "color": SERIES[index % len(SERIES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "markersize": 4,
    }


def inline_svg(figure: Figure, sentence: str, prefix: str) -> str:
    """The figure as <svg role="img"> named by `sentence`; `prefix` keeps its ids apart from those of other plots."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() in (
                "log",
                "symlog",
            ):  # whose own labels are formulas, which are not parsed here
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with plot_style():
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # HTML needs no namespaces
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(sentence)}"', 1)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
