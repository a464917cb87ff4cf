"""The middle of the page of the classic experiments: three regimes, the map, and what more numbers do (E1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse

from latentcodec.report.page import Page
from latentcodec.report.pages.classic_claims import looked_at
from latentcodec.report.pages.classic_training import REGIMES, SQUARE, add_training, nats
from latentcodec.report.plots import INK, NEUTRAL, panel, plot_style, series

ATLAS, SPAN = 31, 3.0


ROW = [
    "KL",
    "PSNR",
    "train PSNR",
    "codes from",
    "to",
    "sigma",
    "mean mu^2",
    "active",
    "spread",
    "same class",
    "draws like data",
]
ROW_CAPTION = (
    "KL in nats an image. PSNR in dB, of the decoded means. codes from, to: the smallest and the largest mu. spread: "
    "variance of the decoded images over that of the images. same class: of the five nearest codes. draws like data: "
    "share of 256 decoded draws of N(0, I) that lie as near to an image as its third neighbour."
)


CLASSES = (
    "#2f81f7",
    "#d55e00",
    "#00936b",
    "#a463c7",
    "#7d8590",
    "#b0760a",
    "#c2408f",
    "#0a8f9c",
    "#6b7d00",
    "#8a4b2a",
)


def add_regimes(page: Page, data: Mapping[str, Any]) -> None:
    page.section(
        "E1: three regimes",
        "Two numbers an image, so that one can see where the codes lie. Dots are the mu of held-out images, "
        "coloured by class; ellipses the sigma of some; circles N(0, I) at 1, 2 and 3. Mind the axes: each plot "
        "has its own.",
    )
    page.plots(
        [(_scatter(data, name, text), f"Codes of the {text}") for name, text in REGIMES.items()],
        "Left the autoencoder: codes far apart, clouds like needles, nothing in between. In the middle the VAE: one "
        "cloud that touches everywhere and fills N(0, I). Right the collapsed one: every image gets the same code.",
    )
    rows = [[text, *_row(looked_at(data, name))] for name, text in REGIMES.items()]
    page.table(["regime", *ROW], rows, ROW_CAPTION)
    page.section(
        "A KL near zero is no autoencoder",
        "One introduction says: if the KL stays near zero, the model is collapsing to an autoencoder. It is the "
        "other way round. The KL is what the code tells of the image. An autoencoder tells very much: its KL is "
        f"the largest of the three ({looked_at(data, 'ae-2')['kl_nats']:.0f} nats). A KL near zero is posterior "
        f"collapse: the code tells nothing ({looked_at(data, 'collapsed-2')['kl_nats']:.3f} nats), and the decoder "
        "draws the mean image.",
    )
    page.pictures(
        [(looked_at(data, name)["draws"], text) for name, text in REGIMES.items()],
        "64 draws of N(0, I), decoded. In the space that the autoencoder uses they all fall on one spot: nearly "
        "the same picture again and again. The VAE draws digits of all kinds. The collapsed one draws its one "
        "grey ghost.",
        0,
    )
    page.pictures(
        [(looked_at(data, name)["reconstructions"], text) for name, text in REGIMES.items()],
        "Held-out images (above) and their reconstructions (below), two numbers an image.",
        0,
    )
    add_training(page, data)


def _row(looked: Mapping[str, Any]) -> list[str]:
    agreement = looked.get("label_agreement")
    return [
        nats(looked["kl_nats"]), f"{looked['psnr_db']:.2f}", f"{looked['train_psnr_db']:.2f}",
        f"{looked['codes_low']:.2f}", f"{looked['codes_high']:.2f}", f"{looked['mean_sigma']:.3f}",
        f"{looked['mean_square_mu']:.2f}", f"{looked['active']} of {looked['numbers']}",
        f"{looked['decoder_spread']:.3f}", "-" if agreement is None else f"{agreement:.0%}",
        f"{looked['draw_precision']:.0%}" if "draw_precision" in looked else "-",
    ]  # fmt: skip


def _scatter(data: Mapping[str, Any], name: str, title: str) -> Figure:
    scatter = looked_at(data, name)["scatter"]
    names = data["label_names"]
    with plot_style():
        figure, axes = panel(SQUARE, title=title, xlabel="first number", ylabel="second number")
        for k in sorted({point[2] for point in scatter["points"]}):
            own = [point for point in scatter["points"] if point[2] == k]
            label = names[k] if 0 <= k < len(names) else None
            axes.scatter(
                [p[0] for p in own], [p[1] for p in own], s=7, color=_colour(k), label=label, linewidths=0
            )
        for x, y, a, b in scatter["ellipses"]:
            axes.add_patch(Ellipse((x, y), 2 * a, 2 * b, fill=False, color=INK, linewidth=0.5, alpha=0.5))
        for radius in (1, 2, 3):
            axes.add_patch(Circle((0, 0), radius, fill=False, color=INK, linestyle="--", linewidth=1))
        reach = max(3.4, 1.05 * max(abs(value) for point in scatter["points"] for value in point[:2]))
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        if names and len(names) <= 12:
            axes.legend(
                fontsize=7, ncols=2, loc="upper left", markerscale=1.6, handletextpad=0.1, columnspacing=0.6
            )
    return figure


def _colour(k: int) -> str:
    return CLASSES[k % len(CLASSES)] if k >= 0 else NEUTRAL


def add_map(page: Page, data: Mapping[str, Any]) -> None:
    page.section(
        "The map",
        "A VAE of two numbers is a map of its images: every point of the square from -3 to 3 has a picture, and "
        "neighbours look alike. Point at the map to see what lies there.",
    )
    looked, names = looked_at(data, "vae-2"), data["label_names"]
    points = [
        {"x": x, "y": y, "colour": _colour(k), "label": names[k] if 0 <= k < len(names) else ""}
        for x, y, k in looked["scatter"]["points"]
    ]
    page.atlas(
        looked["atlas"], points, {name: _colour(k) for k, name in enumerate(names[:12])}, ATLAS, SPAN,
        "The VAE's plane: codes of held-out images, and below them 31 x 31 decoded points of the same square.",
    )  # fmt: skip
    page.pictures(
        [(looked_at(data, name)["map"], text) for name, text in REGIMES.items()],
        "15 x 15 decoded points of the square from -3 to 3. The VAE's changes evenly; for the autoencoder this "
        "square is a speck of the space it uses; for the collapsed one every point is the same.",
        1,
    )
    page.pictures(
        [(looked_at(data, name)["strips"], text) for name, text in REGIMES.items()],
        "Straight lines between the codes of six pairs of images. Largest step over the mean one: "
        + ", ".join(f"{text} {looked_at(data, name)['largest_step']:.2f}" for name, text in REGIMES.items())
        + ".",
        0,
    )
    page.pictures(
        [(looked_at(data, name)["bubbles"], REGIMES[name]) for name in ("ae-2", "vae-2")],
        "Bubbles: an image, its mean decoded, and eight draws of its cloud. A VAE's cloud is as wide as the decoder "
        "bears: the draws look alike, and that is why there are no gaps.",
        0,
    )


MORE_NUMBERS = {
    "ae-16": "autoencoder, 16",
    "vae-16": "VAE, 16",
    "collapsed-16": "collapsed, 16",
    "vae-128": "VAE, 128",
}


def add_more_numbers(page: Page, data: Mapping[str, Any]) -> None:
    page.section(
        "E1 with 16 and 128 numbers",
        "Two numbers are for looking. With sixteen the pictures are better, and with 128 they are no better: what "
        "sixteen do not tell is hardly worth its nats, so most of the others tell next to nothing.",
    )
    page.table(
        ["run", *ROW],
        [[text, *_row(looked_at(data, name))] for name, text in MORE_NUMBERS.items()],
        ROW_CAPTION,
    )
    page.pictures(
        [(looked_at(data, name)["draws"], text) for name, text in MORE_NUMBERS.items()],
        "Draws of N(0, I). Of the autoencoder: fragments.",
        0,
    )
    page.pictures(
        [(looked_at(data, name)["reconstructions"], text) for name, text in MORE_NUMBERS.items()],
        "Held-out images and their reconstructions.", 0,
    )  # fmt: skip
    _add_what_numbers_tell(page, data)
    _add_walks(page, data)


def _add_what_numbers_tell(page: Page, data: Mapping[str, Any]) -> None:
    looked = looked_at(data, "vae-16")
    within = ", ".join(f"{share:.1%}" for share in looked["within"])
    stds = looked["draws_std"]
    with plot_style():
        figure, axes = panel(xlabel="number of the latent, by what it tells", ylabel="KL, nats")
        for index, name in enumerate(("vae-16", "ae-16", "vae-128")):
            told = sorted(looked_at(data, name)["kl_by_number"], reverse=True)
            axes.plot(
                range(1, len(told) + 1),
                [max(v, 1e-4) for v in told],
                label=MORE_NUMBERS[name],
                **series(index),
            )
        axes.set(xscale="log", yscale="log")
        axes.legend(fontsize=8)
        reach, other = panel(xlabel="where one number is moved to", ylabel="distance to the nearest image")
        ticks = range(-6, 7)
        for index, walk in enumerate(looked["walks"][:6]):
            other.plot(ticks, walk["distance"], label=f"{walk['kl']:.2f} nats", **series(index))
        other.axhline(1, color=NEUTRAL, linestyle=":", linewidth=1)
        other.legend(fontsize=7, ncols=2)
    page.plots(
        [
            (figure, "What each number tells, in nats, by rank"),
            (reach, "Distance of decoded pictures to the data along six numbers"),
        ],
        "Left: what each number tells. Right: beyond 3 pictures leave the data (1 is how far held-out images are "
        f"from the training images). Draws of the VAE's clouds: {within} within 1, 2 and 3 (normal: 68.3, 95.4 "
        f"and 99.7 %), deviations {min(stds):.2f} to {max(stds):.2f}, correlation "
        f"{looked['draws_correlation']:.2f} (rms).",
    )


def _add_walks(page: Page, data: Mapping[str, Any]) -> None:
    page.pictures(
        [
            (walk["picture"], f"number {walk['number']}: {walk['kl']:.2f} nats")
            for walk in looked_at(data, "vae-16")["walks"]
        ],
        "One number from -6 to 6, the others at their means; the six that tell the most. Between -3 and 3 they are "
        "digits: one slants, another changes what is written.",
        1,
    )
    page.pictures(
        [(looked_at(data, name)["bubbles"], MORE_NUMBERS[name]) for name in ("ae-16", "vae-16")]
        + [
            (looked_at(data, name)["strips"], f"{MORE_NUMBERS[name]}, lines between codes")
            for name in ("ae-16", "vae-16")
        ],
        "Bubbles and straight lines with sixteen numbers.",
        1,
    )
