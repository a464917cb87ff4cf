"""The page and the table of `bench/throughput.py`: time and memory of encode and decode, side by side.

The ceiling is the best rate that anything reached: the matrix product or any side in any case of that dtype. So no bar
can pass it, in results of earlier versions neither.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from latentcodec.report.page import Page
from latentcodec.report.plots import INK, SERIES, panel, plot_style, series
from latentcodec.report.results import number, origin_facts

DIRECTIONS = ("encode", "decode")
NOTICEABLE = 1.02  # a ratio nearer to 1 than this is called neither good nor bad
Record = dict[str, Any]


def build(data: Mapping[str, Any]) -> Page:
    """The page of a result of kind "throughput"."""
    records = with_ceilings(data["results"])
    page = Page(
        "Speed and memory of encode and decode",
        f"{data['codec']} ({data['latent']}, {data['parameters'] / 1e6:.1f} M parameters, {data['weights']} "
        f"weights) on {data['hardware']['device']}: {', '.join(data['sides'])} with the same weights, the same "
        "input and the same calls, timed in turn.",
    )
    page.headline(headline(records))
    page.section("Speed", "Megapixels a second compare images of all sizes; longer is faster.")
    page.plots(bars(data, records, "megapixels_per_s", "megapixels / s"), SPEED_CAPTION)
    page.section("Memory", "What a call needs beside the weights; shorter is better.")
    page.plots(bars(data, records, "peak_mib", "MiB above the loaded model"), MEMORY_CAPTION)
    page.section(
        "Round by round", "Why the sides take turns: a shared machine is not equally fast all the time."
    )
    page.plots(
        rounds(data, records),
        "Every round of the largest case. Where the curves move together the machine changed its pace; the ratio "
        "within a round does not see it.",
    )
    page.section("All cases", "One row for each side of each case; a time is the median over the rounds.")
    page.table(*table(records), caption=TABLE_CAPTION, tones=tones(records))
    page.section("How it was measured", "The configuration of both sides and of the machine.")
    rates = ", ".join(f"{rate:.3g} in {dtype}" for dtype, rate in data["peak_tflops"].items())
    several = f"{data['rounds']}, after one warm-up of every side"
    page.facts({**data["sides"], "rounds": several, "matrix product, TFLOP/s": rates, **origin_facts(data)})
    return page


SPEED_CAPTION = (
    "Bars are medians over the rounds. The dashed line across a group is the ceiling: the best rate that the matrix "
    "product or any side reached in that dtype, if nothing but convolutions and matrix products took time."
)
MEMORY_CAPTION = (
    "Each side in a fresh process: the peak of the process' resident memory, on a GPU of the allocated memory, less "
    "what was in use after the model was loaded and run on a small image; freed memory goes back to the system "
    "at once, so the peak is what was needed together. No bar: not measured, because the system does not tell, or "
    "because the side is compiled and the compiler's memory could not be told from its own."
)
TABLE_CAPTION = (
    "ours is: the time of that row over ours, the median of the ratios within the rounds; above 1 ours is faster. of "
    "ceiling: the time that the model's convolutions and matrix products would take at the best rate that anything "
    "reached in that dtype, over the time taken. rms error and max error: root mean square and largest of the "
    "differences to diffusers in float32 with the same weights, over all values of the output. peak MiB: memory above "
    "the loaded model. process MiB: the same peak with the model, packed weights included: above the process before it "
    "was loaded."
)


def with_ceilings(records: Sequence[Mapping[str, Any]]) -> list[Record]:
    """The records with nan for what is missing, and floors that no side has gone below."""
    clean: list[Record] = [
        {key: math.nan if value is None else value for key, value in r.items()} for r in records
    ]
    best: dict[str, float] = {}
    for r in clean:
        fastest = min([t for t in r.get("rounds_ms") or [r["ms"]] if t], default=math.nan)
        if r["floor_ms"] / fastest > best.get(r["dtype"], 1.0):
            best[r["dtype"]] = r["floor_ms"] / fastest
    for r in clean:
        factor = best.get(r["dtype"], 1.0)
        r["floor_ms"] /= factor
        r["floor_megapixels_per_s"] *= factor
    return clean


def headline(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """Ours against the fastest other side and the default, in the largest case of the smallest batch.

    Where there is no such ratio, the pace of the fastest side.
    """
    cards = []
    for direction, dtype in dict.fromkeys((r["direction"], r["dtype"]) for r in records):
        group = [r for r in records if (r["direction"], r["dtype"]) == (direction, dtype)]
        size, batch = max(((r["size"], r["batch"]) for r in group), key=lambda s: (s[0], -s[1]))
        group = [r for r in group if (r["size"], r["batch"]) == (size, batch)]
        ratios = {r["side"]: r["time_over_ours"] for r in group if r["side"] != "ours"}
        ratios = {side: ratio for side, ratio in ratios.items() if not math.isnan(ratio)}
        case = f"{direction}, {dtype}, {batch} x {size}\u00b2"
        if ratios:
            best = min(ratios, key=ratios.__getitem__)
            meaning = f"{case}: speed of ours over {best}"
            if best != "diffusers" and "diffusers" in ratios:
                meaning += f"; {ratios['diffusers']:.2f}x over diffusers as it comes"
            cards.append((f"{ratios[best]:.2f}x", meaning, _level(ratios[best])))
        else:
            fastest = min(group, key=lambda r: (math.isnan(r["ms"]), r["ms"]))
            pace = number(fastest["megapixels_per_s"], 3)
            cards.append((pace, f"{case}: megapixels a second, {fastest['side']}", ""))
    return cards


def _level(ratio: float) -> str:
    if ratio > NOTICEABLE:
        return "healthy"
    return "failure" if ratio < 1 / NOTICEABLE else ""


def table(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, for the page and for the terminal."""
    header = ["case", "dtype", "pixels", "side", "ours is", "ms", "img/s", "Mpx/s"]
    header += ["of ceiling", "peak MiB", "process MiB", "rms error", "max error"]
    rows = []
    for r in with_ceilings(records):
        ratio = number(r["time_over_ours"], 2)
        cells = [r["direction"], r["dtype"], f"{r['batch']} x {r['size']}\u00b2", r["side"]]
        cells += [ratio if ratio == "-" else ratio + "x", number(r["ms"], 1), number(r["images_per_s"], 2)]
        cells += [number(r["megapixels_per_s"], 3), number(100 * r["floor_ms"] / r["ms"], 0) + " %"]
        rms, largest = r.get("rms_error", math.nan), r.get("max_error", math.nan)
        memory = (number(r.get(key, math.nan), 1) for key in ("peak_mib", "process_mib"))
        rows.append([*cells, *memory, f"{rms:.1e}", f"{largest:.1e}"])
    return header, rows


def tones(records: Sequence[Record]) -> list[list[str]]:
    """For each cell of `table`: where ours is faster or slower than another side, beyond what a run can tell."""
    words = {"healthy": "better", "failure": "worse", "": ""}
    result = []
    for r in records:
        ratio = r["time_over_ours"]
        tone = "" if r["side"] == "ours" or math.isnan(ratio) else words[_level(ratio)]
        result.append([tone if place == 4 else "" for place in range(13)])
    return result


def bars(
    data: Mapping[str, Any], records: Sequence[Record], key: str, label: str
) -> list[tuple[Figure, str]]:
    """A panel for each dtype and direction; a group for each size and batch, a bar for each side."""
    sides = list(data["sides"])
    shapes = sorted({(r["size"], r["batch"]) for r in records}, reverse=True)
    step = len(sides) + 1  # bars of a group and a gap
    panels = []
    for dtype, direction in dict.fromkeys((r["dtype"], r["direction"]) for r in records):
        group = [r for r in records if (r["dtype"], r["direction"]) == (dtype, direction)]
        with plot_style():
            figure, axes = panel(
                (4.8, 0.9 + 0.19 * len(shapes) * step), title=f"{direction}, {dtype}", xlabel=label
            )
            named: set[str] = set()
            for r in group:
                place = shapes.index((r["size"], r["batch"])) * step + len(sides) - 1 - sides.index(r["side"])
                colour = SERIES[sides.index(r["side"]) % len(SERIES)]
                hatch = ("", "//", "..", "xx", "\\\\")[sides.index(r["side"]) % 5]
                name = r["side"] if r["side"] not in named else None
                named.add(r["side"])
                axes.barh(
                    place,
                    r[key],
                    height=0.86,
                    color=colour,
                    hatch=hatch,
                    edgecolor=INK,
                    linewidth=0.3,
                    label=name,
                )
                if key == "megapixels_per_s":
                    ends = place - 0.5, place + 0.5
                    axes.vlines(r["floor_megapixels_per_s"], *ends, color=INK, linestyle="--", linewidth=1)
            middles = [number * step + (len(sides) - 1) / 2 for number in range(len(shapes))]
            axes.set_yticks(middles, [f"{batch} x {size}\u00b2" for size, batch in shapes])
            axes.grid(visible=False, axis="y")
            figure.legend(loc="outside upper left", ncols=2, fontsize=8)
        ours = "; ".join(f"{r['side']} {r['batch']} x {r['size']}: {number(r[key], 2)}" for r in group)
        panels.append((figure, f"{direction} in {dtype}, {label}: {ours}"))
    return panels


def rounds(data: Mapping[str, Any], records: Sequence[Record]) -> list[tuple[Figure, str]]:
    """Milliseconds of every round in the case of most pixels, in the last dtype; a panel for each direction."""
    dtype, sides = list(data["peak_tflops"])[-1], list(data["sides"])
    panels = []
    for direction in DIRECTIONS:
        group = [
            r for r in records if (r["direction"], r["dtype"]) == (direction, dtype) and r.get("rounds_ms")
        ]
        if not group:
            continue
        size, batch = max(((r["size"], r["batch"]) for r in group), key=lambda s: s[0] ** 2 * s[1])
        title = f"{direction}, {dtype}, {batch} x {size}\u00b2"
        with plot_style():
            figure, axes = panel(title=title, xlabel="round", ylabel="ms")
            for r in (r for r in group if (r["size"], r["batch"]) == (size, batch)):
                places = range(1, len(r["rounds_ms"]) + 1)
                axes.plot(places, r["rounds_ms"], label=r["side"], **series(sides.index(r["side"])))
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(fontsize=8)
        panels.append((figure, f"Milliseconds of each round, {title}"))
    return panels
