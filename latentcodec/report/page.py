"""What the pages of `bench/` share: the table on stdout, the JSON file, the HTML page and the last line.

A page is one file without a single reference to anything outside: plots are inline SVG, pictures inline PNG,
and it follows the reader's light or dark theme. Every table, plot and row of pictures carries a sentence that
says what it means. What is measured, and how, is the business of the benches.

Shapes: C channels, H W pixels.
"""

import base64
import io
import json
import math
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from html import escape
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from latentcodec.files import printable, write_whole
from latentcodec.machine import cpu_name, instruction_sets, physical_cores
from latentcodec.pixels import to_uint8

# Colours that read on white and on near-black alike. INK is a stand-in that becomes the page's text colour.
INK = "#010203"
OURS, SECOND, THIRD, NEUTRAL = "#2f81f7", "#e8833a", "#3fa266", "#8b949e"
SERIES = (OURS, SECOND, THIRD, "#b180d7", "#d65d8a", "#b8a038")

PLOT_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
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

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f8fa; --line: #d7dce1; --ink: #1f2328;
        --soft: #59636e; --accent: #0969da; }
@media (prefers-color-scheme: dark) {
:root { --page: #0d1117; --card: #161b22; --line: #30363d; --ink: #e6edf3;
        --soft: #9aa4af; --accent: #58a6ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .4rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .4rem 0 1rem; }
.lead { font-size: 1.08rem; color: var(--soft); }
.headline { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.6rem 0; }
.headline div { flex: 1 1 11rem; padding: .9rem 1.1rem; border: 1px solid var(--line); border-radius: .6rem;
                background: var(--card); color: var(--soft); font-size: .88rem; line-height: 1.4; }
.headline b { display: block; font-size: 1.6rem; line-height: 1.35; font-weight: 650; color: var(--accent); }
figure { margin: 1.4rem 0 2rem; }
figcaption, .caption { color: var(--soft); font-size: .9rem; line-height: 1.5; max-width: 50rem; }
figcaption { margin-top: .6rem; }
svg { display: block; width: 100%; height: auto; color: var(--ink); }
svg text { font-family: inherit !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .5rem; border-bottom: 1px solid var(--line);
         text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
.text { text-align: left; }
tbody tr:hover { background: var(--card); }
.pictures { display: grid; gap: .5rem; }
.pictures img { display: block; width: 100%; height: auto; border: 1px solid var(--line); }
.pictures span { display: block; color: var(--soft); font-size: .8rem; padding-top: .2rem; }
summary { cursor: pointer; color: var(--accent); margin: 1rem 0 .6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.4rem; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; }
@media print { h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""


@dataclass
class Page:
    """One self-contained HTML page, written from top to bottom."""

    title: str
    lead: str
    """What was measured and the main result, in one or two sentences."""
    parts: list[str] = field(default_factory=list)

    def headline(self, numbers: Sequence[tuple[str, str]]) -> None:
        """The few (number, meaning) that somebody who reads nothing else should see."""
        cards = "".join(f"<div><b>{escape(n)}</b>{escape(meaning)}</div>" for n, meaning in numbers)
        self.parts.append(f'<div class="headline">{cards}</div>')

    def section(self, heading: str, text: str) -> None:
        """A heading and the paragraph that says what follows."""
        self.parts.append(f"<h2>{escape(heading)}</h2><p>{escape(text)}</p>")

    def facts(self, facts: Mapping[str, Any]) -> None:
        """A list of names and values: the configuration and the machine."""
        items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
        self.parts.append(f"<dl>{items}</dl>")

    def table(
        self, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, fold: str | None = None
    ) -> None:
        """A table of formatted cells; `fold` hides a long one behind that line until it is clicked."""
        kinds = ["" if numeric else ' class="text"' for numeric in _numeric_columns(rows, len(header))]
        head = _table_row("th", kinds, header)
        body = "\n".join(_table_row("td", kinds, row) for row in rows)
        table = f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'
        if fold is not None:
            table = f"<details><summary>{escape(fold)}</summary>{table}</details>"
        self.parts.append(f'{table}<p class="caption">{escape(caption)}</p>')

    def plot(self, figure: Figure, caption: str) -> None:
        """A matplotlib figure drawn inside `plot_style()`, as inline SVG."""
        svg = _inline_svg(figure, prefix=f"plot{len(self.parts)}-")
        self.parts.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>")

    def pictures(self, pictures: Sequence[tuple[Tensor, str]], caption: str) -> None:
        """One row of pictures [C, H, W] in [-1, 1], C 1 or 3, each with its label under it."""
        cells = "".join(
            f'<div><img alt="{escape(label)}" src="{_png(picture)}"><span>{escape(label)}</span></div>'
            for picture, label in pictures
        )
        columns = f"grid-template-columns: repeat({len(pictures)}, 1fr)"
        grid = f'<div class="pictures" style="{columns}">{cells}</div>'
        self.parts.append(f"<figure>{grid}<figcaption>{escape(caption)}</figcaption></figure>")

    def render(self) -> str:
        """The whole document."""
        title, lead, body = escape(self.title), escape(self.lead), "\n".join(self.parts)
        return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head>
<body><main><h1>{title}</h1><p class="lead">{lead}</p>
{body}
</main></body></html>
"""


def require_folder(out: Path) -> None:
    """Make the folder of the results; called before anything is measured, so that no work is lost for want of it.

    Raises `ValueError` naming `--out` and the folder if no file can be written there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: no results can be written there ({error.strerror})") from error


def write(page: Page, data: Mapping[str, Any], out: Path, name: str) -> dict[str, str]:
    """Write `name`.json and `name`.html (see `stem`) into `out`, made where missing; their paths by suffix.

    Each file appears whole or not at all. Raises `OSError` where the disk refuses.
    """
    texts = {"json": json.dumps(finite(data), indent=1) + "\n", "html": page.render()}
    for suffix, text in texts.items():
        write_whole(out / f"{name}.{suffix}", printable(text).encode())
    return {suffix: str(out / f"{name}.{suffix}") for suffix in texts}


def print_last_line(data: Mapping[str, Any]) -> None:
    """End stdout with one line of JSON, so that a program can read what a person has just read."""
    print(json.dumps(finite(data), separators=(",", ":")), flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The table of a page on stdout, its columns aligned."""
    numeric = _numeric_columns(rows, len(header))
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = zip(row, widths, numeric, strict=True)
        line = "  ".join(c.rjust(width) if right else c.ljust(width) for c, width, right in cells).rstrip()
        print(printable(line))


def number(value: float | None, digits: int) -> str:
    """A value for a table: `digits` after the point, "-" where it was not measured."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def finite(value: Any) -> Any:
    """`value` with every inf and nan in it replaced by None, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine and the software that a measurement belongs to."""
    model = cpu_name()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else model,
        "cpu": model,
        "cores": physical_cores(),
        "threads": torch.get_num_threads(),
        "cpu_instructions": instruction_sets() or [torch.backends.cpu.get_cpu_capability()],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def machine_facts(machine: Mapping[str, Any]) -> dict[str, str]:
    """`hardware` for a page."""
    units = ", ".join(machine["cpu_instructions"])
    return {
        "device": machine["device"],
        "processor": f"{machine['cpu']}, {machine['cores']} cores ({units}), {machine['threads']} threads",
        "software": f"torch {machine['torch']}, Python {machine['python']}, {machine['system']}",
    }


def print_threads(threads: int) -> None:
    """The line with which a bench begins."""
    flags = " ".join(instruction_sets())
    print(f"on {cpu_name()} ({flags}) with {threads} of {physical_cores()} cores", file=sys.stderr)


def stem(codecs: Sequence[str], machine: Mapping[str, Any], bench: str) -> str:
    """The file name of a result, without suffix: codec_hardware_date_bench."""
    name = _codec_slug(codecs[0]) + (f"-and-{len(codecs) - 1}-more" if len(codecs) > 1 else "")
    device = machine["device"]
    if device == machine["cpu"]:
        device = f"{device} {machine['cores']} cores"
    return f"{name}_{_slug(device)}_{date.today().isoformat()}_{bench}"


def plot_style() -> Any:
    """Context manager: figures made inside it look like the page."""
    return matplotlib.rc_context(PLOT_STYLE)


def _table_row(tag: str, kinds: Sequence[str], cells: Sequence[str]) -> str:
    joined = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
    return f"<tr>{joined}</tr>"


def _inline_svg(figure: Figure, prefix: str) -> str:
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with plot_style():
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # HTML needs no namespaces
    # Ids are unique within a plot only, and a page holds several plots.
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)


def _png(picture: Tensor) -> str:
    """[C, H, W] in [-1, 1] as a data URL."""
    pixels = to_uint8(picture).permute(1, 2, 0).squeeze(-1).cpu().numpy()  # [H, W, 3] or [H, W]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _numeric_columns(rows: Sequence[Sequence[str]], columns: int) -> list[bool]:
    """Which columns hold only numbers, with or without a unit behind them."""
    return [all(re.match(r"[-+]?(\d|inf|$)", row[i]) for row in rows) for i in range(columns)]


def _codec_slug(source: str) -> str:
    """`runs/photos/codec` -> photos-codec, `owner/name` -> owner-name, `sd.json` -> sd."""
    path = Path(source)
    return _slug(path.stem if path.is_file() else "-".join(path.parts[-2:]))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
