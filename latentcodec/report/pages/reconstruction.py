"""The page and the table of `bench/reconstruction.py`: how much of an image survives one codec or several."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from latentcodec.quality.image_codecs import HONEST
from latentcodec.report.page import Page
from latentcodec.report.plots import NEUTRAL, SERIES, panel, plot_style, series
from latentcodec.report.results import decibels, number, origin_facts, signed

Entry = Mapping[str, Any]


def build(data: Mapping[str, Any]) -> Page:
    """The page of a result of kind "reconstruction"."""
    codecs = data["codecs"]
    page = Page(
        "Reconstruction quality",
        f"{', '.join(entry['codec'] for entry in codecs)} on {data['evaluated']} images of {data['folder']}. Beside "
        "each codec stands the KLT: the best that a linear transform of single blocks does with as many latent values, "
        f"fitted on {data['klt_fitted_on']}.",
    )
    page.headline(headline(codecs))
    page.table(*table(codecs), caption=f"{TABLE_CAPTION} {data['lpips']}.", tones=tones(codecs))
    if data.get("viewer"):
        page.section(
            "See for yourself", "The same crops through every codec: the largest error of the first one."
        )
        page.viewer(data["viewer"], data["pictures"], f"Worst, median and best image. {HONEST}")
    if any(entry.get("rivals") for entry in codecs):
        page.section("Rate", "Bits of a pixel against decibels.")
        page.plot(_rate(codecs), HONEST, "PSNR by bits a pixel of the codecs, their KLTs and image formats")
    if "images" in data:
        page.section("Image by image", "A mean hides which images a codec is good at. These plots do not.")
        page.plots(_scores(data), SCORES_CAPTION)
    _groups(page, data.get("images", {}))
    _text_and_colours(page, codecs)
    page.section("How it was measured", "The configuration of this run, for whoever repeats it.")
    images = f"{data['evaluated']} of {data['folder']}; {len(data['skipped'])} skipped"
    keys = {
        "protocol": "protocol",
        "klt_fitted_on": "KLT fitted on",
        "lpips": "LPIPS",
        "text": "text",
        "dtype": "dtype",
    }
    page.facts(
        {
            "images": images,
            **{name: data[key] for key, name in keys.items() if key in data},
            **origin_facts(data),
        }
    )
    _image_tables(page, data)
    return page


TABLE_CAPTION = (
    "PSNR: signal over error in decibels, more is better, 6 dB halve the error; the interval holds the mean over all "
    "such images in about 95 of 100 cases (bootstrap, widened where images are few). SSIM: 1 is equal. LPIPS: "
    "distance in the features of a network "
    "trained on photographs, 0 is equal. KLT: PSNR of the linear transform of f x f blocks with the same c numbers for "
    "each. bits/px: 8 bits for each latent value. min and max: the worst image. infinite: at least one "
    "picture came back unchanged."
)
SCORES_CAPTION = (
    "The images sorted by PSNR, worst first, each curve by itself, and every image against the KLT: above the diagonal "
    "the codec beats it. Images that came back unchanged have infinite PSNR and are not drawn."
)


def headline(codecs: Sequence[Entry]) -> list[tuple[str, str, str]]:
    """PSNR of each codec; of a single one also the other numbers."""
    if len(codecs) > 1:
        return [
            (
                f"{decibels(e['psnr']['mean'])} dB",
                f"mean PSNR of {e['codec']}, {e['latent']}: {_over_klt(e)} against the KLT",
                _gain_over_klt(e),
            )
            for e in codecs
        ]
    (entry,) = codecs
    cards = [
        (
            f"{decibels(entry['psnr']['mean'])} dB",
            f"mean PSNR; the worst image has {decibels(entry['psnr']['min'])}",
            "",
        ),
        (
            _over_klt(entry),
            f"against the linear KLT of the same size, {entry['latent']}",
            _gain_over_klt(entry),
        ),
        (number(entry["ssim"]["mean"], 4), "mean SSIM; 1 is equal", ""),
    ]
    if entry["lpips"]["mean"] is not None:
        cards.append((number(entry["lpips"]["mean"], 4), "mean LPIPS; 0 is equal", ""))
    return cards


def _over_klt(entry: Entry) -> str:
    gain = entry["psnr_over_klt"]
    return "-" if gain is None else f"{signed(gain, 2)} dB"


def _gain_over_klt(entry: Entry) -> str:
    """A codec that does not beat a linear transform has failed; nothing is said where a picture came back unchanged."""
    gain = entry["psnr_over_klt"]
    return "" if gain is None else "healthy" if gain > 0 else "failure"


def table(codecs: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, for the page and for the terminal."""
    header = [
        "codec",
        "latent",
        "PSNR dB",
        "95 %",
        "min",
        "vs KLT",
        "SSIM",
        "LPIPS",
        "max",
        "KLT dB",
        "bits/px",
        "M params",
    ]
    return header, [
        [
            e["codec"], e["latent"], decibels(e["psnr"]["mean"]), _interval(e["psnr"]), decibels(e["psnr"]["min"]),
            signed(e["psnr_over_klt"], 2), number(e["ssim"]["mean"], 4), number(e["lpips"]["mean"], 4),
            number(e["lpips"]["max"], 4), decibels(e["klt_psnr"]["mean"]), number(8 * e["floats_per_pixel"], 3),
            number(e["parameters"] / 1e6, 2),
        ]
        for e in codecs
    ]  # fmt: skip


def _interval(spread: Entry) -> str:
    """Of a mean; "-" of a single image, of an old result, and where an image came back unchanged."""
    low, high = (number(value, 2) for value in spread.get("interval") or (None, None))
    return "-" if low == "-" else f"{low} to {high}"


def tones(codecs: Sequence[Entry]) -> list[list[str]]:
    """For each cell of `table`: whether a codec beats its KLT."""
    words = {"healthy": "better", "failure": "worse", "": ""}
    return [[words[_gain_over_klt(e)] if i == 5 else "" for i in range(12)] for e in codecs]


def _rate(codecs: Sequence[Entry]) -> Figure:
    with plot_style():
        figure, axes = panel(xlabel="bits a pixel", ylabel="PSNR, dB")
        for index, e in enumerate(codecs):
            bits = 8 * e["floats_per_pixel"]
            axes.plot([bits], [e["psnr"]["mean"]], label=e["codec"], **series(index) | {"markersize": 8})
            axes.plot([bits], [e["klt_psnr"]["mean"]], color=SERIES[index % len(SERIES)], marker="_", linestyle="none",
                      markersize=12, label=f"KLT {e['latent']}")  # fmt: skip
            for place, (form, rival) in enumerate((e.get("rivals") or {}).items()):
                if rival.get("too_large"):
                    continue  # it has more bits than these
                label = form if index == 0 else None
                axes.plot(
                    [bits],
                    [rival["psnr"]],
                    color=NEUTRAL,
                    marker="123"[place % 3],
                    markersize=10,
                    linestyle="none",
                    label=label,
                )
        axes.legend(fontsize=7, ncols=2)
    return figure


def _scores(data: Mapping[str, Any]) -> list[tuple[Figure, str]]:
    with plot_style():
        ranked, left = panel(xlabel="images, worst first", ylabel="PSNR, dB")
        against, right = panel(xlabel="PSNR of the KLT, dB", ylabel="PSNR of the codec, dB")
        for index, (name, entries) in enumerate(data["images"].items()):
            own = [e["psnr"] for e in entries if e["psnr"] is not None]
            klt = [e["klt_psnr"] for e in entries if e["klt_psnr"] is not None]
            style = series(index)
            left.plot(range(1, len(own) + 1), sorted(own), label=name, **style)
            left.plot(
                range(1, len(klt) + 1),
                sorted(klt),
                color=style["color"],
                alpha=0.5,
                linestyle=":",
                label="its KLT",
            )
            pairs = [(e["klt_psnr"], e["psnr"]) for e in entries if None not in (e["klt_psnr"], e["psnr"])]
            if pairs:
                klts, owns = zip(*pairs, strict=True)
                right.plot(klts, owns, label=name, **style | {"linestyle": "none"})
        low, high = right.get_xlim()
        right.plot([low, high], [low, high], color=NEUTRAL, linewidth=1)
        left.legend(fontsize=8)
        if right.get_legend_handles_labels()[0]:  # not where every image came back unchanged
            right.legend(fontsize=8)
    return [(ranked, "PSNR of every image, sorted"), (against, "PSNR of every image against that of its KLT")]


def _groups(page: Page, images: Mapping[str, Sequence[Entry]]) -> None:
    """Means by subfolder, such as faces and line art, where there are several."""
    names = sorted({entry["group"] for entries in images.values() for entry in entries if "group" in entry})
    if len(names) < 2:
        return
    page.section("By folder", "What a codec is good at: the mean PSNR of each subfolder, in dB.")
    rows = []
    for codec, entries in images.items():
        groups = [
            [e["psnr"] for e in entries if e["group"] == name and e["psnr"] is not None] for name in names
        ]
        rows.append([codec, *(number(fmean(values), 2) if values else "-" for values in groups)])
    page.table(["codec", *names], rows, "Images that came back unchanged are left out.")


def _text_and_colours(page: Page, codecs: Sequence[Entry]) -> None:
    """Text, round trips, colours: what older results do not have."""
    if legible := [e for e in codecs if e.get("legibility")]:
        _text(page, legible)
    if trips := [e for e in codecs if e.get("round_trips_psnr")]:
        _round_trips(page, trips)


def _text(page: Page, codecs: Sequence[Entry]) -> None:
    page.section("Text", "How much of drawn text an OCR program still reads; PSNR hides that it is lost.")
    original = codecs[0]["legibility"]["original"]
    rows = [["original", *(f"{share:.0%}" for share in original.values())]]
    rows += [[e["codec"], *(f"{share:.0%}" for share in e["legibility"]["codec"].values())] for e in codecs]
    caption = "1 - edit distance over the length of the text, spaces ignored, by the size of the font."
    page.table(["text of", *(f"{size} px" for size in original)], rows, caption)


def _round_trips(page: Page, codecs: Sequence[Entry]) -> None:
    page.section("Again and again", "Ten times through the codec, as an edited picture may go.")
    with plot_style():
        figure, axes = panel(xlabel="round trips", ylabel="PSNR against the original, dB")
        for index, e in enumerate(codecs):
            places = range(1, len(e["round_trips_psnr"]) + 1)
            axes.plot(places, e["round_trips_psnr"], label=e["codec"], **series(index))
        axes.legend(fontsize=8)
    shifts, ends = [], []
    for e in codecs:
        shifts.append(f"{e['codec']}: {', '.join(f'{value:+.2f}' for value in e['colour_shift_levels'])}")
        first, last = e["round_trips_psnr"][0], e["round_trips_psnr"][-1]
        ends.append(f"{e['codec']} from {decibels(first)} to {decibels(last)} dB")
    page.plot(
        figure,
        "On the first images. Shift of the mean of each channel after one trip, in 8-bit levels: "
        f"{'; '.join(shifts)}.",
        f"PSNR by round trips: {'; '.join(ends)}",
    )


def _image_tables(page: Page, data: Mapping[str, Any]) -> None:
    for name, entries in data.get("images", {}).items():
        rows = [
            [
                e["file"],
                decibels(e["psnr"]),
                number(e["ssim"], 4),
                number(e["lpips"], 4),
                decibels(e["klt_psnr"]),
            ]
            for e in entries
        ]
        header = ["image", "PSNR dB", "SSIM", "LPIPS", "KLT dB"]
        caption = "Every evaluated image, in the order of the file names."
        page.table(header, rows, caption, fold=f"All {len(entries)} images of {name}")
    if data["skipped"]:
        rows = [[entry["file"].split("/")[-1], entry["reason"]] for entry in data["skipped"]]
        page.table(
            ["skipped file", "reason"], rows, "These files are in the folder and in none of the numbers."
        )
