"""The page of `latentcodec inspect`: what a codec is fit for, why, and the pictures to see it by."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from latentcodec.quality.latent_measures import HISTOGRAM
from latentcodec.report import scales
from latentcodec.report.page import Page
from latentcodec.report.pages.space import add_space
from latentcodec.report.plots import INK, NEUTRAL, OURS, SECOND, THIRD, panel, plot_style, series
from latentcodec.report.results import number, origin_facts

TITLES = {
    "diffusion": "For a diffusion model",
    "sampling": "For sampling from N(0, I)",
    "storage": "For storage",
}


def build(data: Mapping[str, Any]) -> Page:
    """The page of a result of kind "inspect"."""
    measures = data["measures"]
    page = Page(
        f"{data['codec']}: what its latents are like",
        f"{measures['latent']}, {data['parameters'] / 1e6:.1f} M parameters, looked at on {measures['images']} images "
        f"of {data['folder']}, the middle {data['image_side']} pixels of each: "
        f"{number(measures.get('psnr_db'), 2)} dB.",
    )
    page.verdicts(
        [
            {
                "title": TITLES[key],
                "level": verdict["level"],
                "reasons": [*verdict["reasons"], *verdict["notes"]],
            }
            for key, verdict in data["verdicts"].items()
        ]
    )
    page.section(
        "The numbers", "Each with its limit, and codecs that are known. Hatched is where a rule objects."
    )
    page.scales(scales.lines(measures, data["verdicts"]), SCALES_CAPTION)
    page.section("See for yourself", "Slide, flicker or subtract; the zoom shows single pixels.")
    zoom = (
        4 if data["image_side"] <= 64 else 2 if data["image_side"] <= 128 else 0
    )  # small ones could not be seen
    page.viewer(data["viewer"], data["pictures"], VIEWER_CAPTION, zoom)
    strips = {strip["name"]: strip["pictures"] for strip in data["strips"]}
    _channels(page, data, strips)
    _distribution(page, data)
    _robustness(page, data, strips, zoom or 1)
    if "space" in data:
        add_space(page, data["space"], zoom)
    if data.get("training"):
        _training(page, data["training"])
    _how(page, data)
    return page


SCALES_CAPTION = (
    "Medians or means over the channels that live. SEC ranks networks of one normalisation: a whitened latent has a "
    "high one and may be learnt as easily. The noise that costs 1 dB is relative to a codec's own error; compare "
    "codecs by the PSNR at noise 0.05 and 0.1 below."
)
VIEWER_CAPTION = (
    "The middle of the image with the lowest, the median and the highest PSNR. The KLT is the best linear code of "
    "single blocks with as many numbers, fitted on these very images. JPEG has at most as many bits as the latent in 8 "
    "bits a number, which an entropy coder would still shorten, unless its label says that it cannot be so small: no "
    "fair race, but a scale."
)


CHANNELS_CAPTION = (
    "The latent of the median image, black and white at 2.5 deviations. Bits an element; dB that the picture loses "
    "where the channel is replaced by its mean, on 8 images."
)


def _channels(page: Page, data: Mapping[str, Any], strips: Mapping[str, Any]) -> None:
    page.section("Channels", "What each says of the image, and what the decoder makes of it.")
    channels = data["channels"]
    if "channels" in strips:
        labelled = []
        for (picture, _), channel in zip(strips["channels"], channels, strict=False):
            dead = f", dead: {channel['dead']}" if channel["dead"] else ""
            drop = "" if channel.get("drop_db") is None else f", {channel['drop_db']:.2f} dB"
            labelled.append((picture, f"{channel['name']}: {channel['rate_bits']:.1f} bits{drop}{dead}"))
        page.pictures(labelled, CHANNELS_CAPTION, 4 if len(channels) <= 16 else 2)
        page.pictures(
            [tuple(p) for p in strips["colours"]], "Its three principal components as red, green and blue.", 4
        )
    page.plots(_worth(channels), "Below the dashed line, 0.01 dB, the decoder ignores a channel.")
    _channel_table(page, channels)


def _worth(channels: Sequence[Mapping[str, Any]]) -> list[tuple[Figure, str]]:
    """A bar for each channel: dB lost without it, and its bits."""
    names, count = [channel["name"] for channel in channels], len(channels)
    with plot_style():
        worth, axes = panel(xlabel="channel", ylabel="dB lost without it")
        axes.bar(names, [max(channel.get("drop_db") or 0, 1e-3) for channel in channels], color=OURS)
        axes.set_yscale("log")
        axes.axhline(0.01, color=SECOND, linestyle="--", linewidth=1)
        rates, other = panel(xlabel="channel", ylabel="bits an element")
        other.bar(names, [channel["rate_bits"] for channel in channels], color=THIRD)
    for figure in (worth, rates):
        figure.axes[0].tick_params(axis="x", labelsize=7 if count > 16 else 9)
        if count > 40:
            figure.axes[0].set_xticks([])
    return [
        (worth, f"dB lost without each of {count} channels"),
        (rates, f"bits an element of each of {count} channels"),
    ]


def _channel_table(page: Page, channels: Sequence[Mapping[str, Any]]) -> None:
    header = ["channel", "signal", "bits", "KL nats", "mean", "std", "SEC", "dB", "in 3 std", "kurtosis", "largest",
              "dead"]  # fmt: skip
    rows = [
        [
            c["name"], f"{c['signal_share']:.1%}", number(c["rate_bits"], 2), number(c["kl_nats"], 2),
            f"{c['mean']:+.3f}", number(c["std"], 3), number(c["sec"], 2), number(c.get("drop_db"), 2),
            f"{c['within_3']:.1%}", number(c["kurtosis"], 1), number(c["largest"], 1), c["dead"] or "",
        ]
        for c in channels
    ]  # fmt: skip
    page.table(header, rows, "signal: the share of a channel's variance that depends on the image. bits: its rate. "
               "SEC: its energy in high frequencies. dB: lost without it. largest: the largest draw, in deviations.",
               fold=f"All {len(channels)} channels")  # fmt: skip


def _distribution(page: Page, data: Mapping[str, Any]) -> None:
    measures, curves = data["measures"], data["curves"]
    page.section("Distribution", "How near to a normal distribution a draw is; noise schedules expect one.")
    low, high, bins = HISTOGRAM
    width = (high - low) / bins
    centres = [low + (k + 0.5) * width for k in range(bins)]
    with plot_style():
        density, axes = panel(
            xlabel="deviations from the mean", ylabel="density", yscale="log", ylim=(1e-5, 3)
        )
        for row in curves["histograms"]:
            axes.plot(
                centres,
                [value or math.nan for value in row],
                color=OURS,
                alpha=max(0.15, 1.5 / len(data["channels"])),
                linewidth=1,
            )
        normal = [2.718281828 ** (-x * x / 2) / 2.506628 for x in centres]
        axes.plot(centres, normal, color=INK, linestyle="--", linewidth=1.2, label="normal")
        axes.plot([], [], color=OURS, label="channels")
        axes.legend()
        correlation, other = panel(title="correlation of the channels")
        picture = other.imshow(curves["correlations"], vmin=-1, vmax=1, cmap="PuOr", interpolation="nearest")
        other.grid(visible=False)
        correlation.colorbar(picture)
    shares = ", ".join(f"{measures[f'within_{k}']:.1%}" for k in (1, 2, 3))
    page.plots(
        [(density, f"Densities of the channels; {shares} within one, two and three deviations"),
         (correlation, f"Correlations of the channels; effective rank {measures['effective_rank']:.1f}")],
        f"Within one, two and three deviations lie {shares} of the draws (normal: 68.3, 95.4 and 99.7 %); kurtosis "
        f"{number(measures['kurtosis'], 1)} (normal: 3). Effective rank of the channels: "
        f"{number(measures['effective_rank'], 1)} of {len(data['channels'])}.",
    )  # fmt: skip
    if curves.get("spectrum"):
        page.section("Spectrum", "Smooth latents fall steeply; white noise is flat.")
        page.plots(
            [
                (
                    _spectrum(data),
                    "Power of the latents by frequency, beside the image's, the KLT's and white noise",
                )
            ],
            f"Radial mean of the DCT, every channel scaled to unit variance. SEC {number(measures['sec'], 2)}, VIV "
            f"(label-free, 8 x 8 cells; white 1.57) {number(measures.get('viv'), 2)}, neighbouring cells are "
            f"{number(measures.get('lds'), 2)} more alike than distant ones. Compare VIV between latents of one shape "
            "only.",
        )


def _spectrum(data: Mapping[str, Any]) -> Figure:
    curves = data["curves"]
    with plot_style():
        figure, axes = panel(
            xlabel="frequency, half cycles a cell", ylabel="power", xscale="log", yscale="log"
        )
        for index, (key, label) in enumerate(
            (
                ("spectrum", data["codec"]),
                ("image_spectrum", "the image, averaged to cells"),
                ("klt_spectrum", "KLT"),
            )
        ):
            if curves.get(key):
                axes.plot(*zip(*curves[key], strict=True), label=label, **series(index))
        axes.axhline(1, color=NEUTRAL, linewidth=1, linestyle=":", label="white noise")
        axes.legend(fontsize=8)
    return figure


def _robustness(page: Page, data: Mapping[str, Any], strips: Mapping[str, Any], zoom: int) -> None:
    measures = data["measures"]
    page.section(
        "What it bears", "A generator hands over latents that are slightly wrong; a store rounds them."
    )
    (_, whole), *points = data["curves"]["noise"]
    with plot_style():
        figure, axes = panel(xlabel="noise, deviations", ylabel="PSNR, dB", xscale="log")
        axes.plot(*zip(*points, strict=True), label=data["codec"], **series(0))
        axes.axhline(whole, color=NEUTRAL, linestyle=":", linewidth=1, label="without noise")
        axes.axvline(measures["noise_1db"], color=SECOND, linestyle="--", linewidth=1, label="1 dB lost")
        axes.legend(fontsize=8)
    errors = measures.get("equivariance_error") or {}
    shown = "; ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in errors.items())
    page.plots(
        [
            (
                figure,
                f"PSNR falls from {whole:.2f} dB by 1 dB at noise of {measures['noise_1db']:.3f} deviations",
            )
        ],
        f"On {measures['disturbed_images']} images. At noise 0.05: {number(measures['psnr_at_noise_0.05_db'], 2)} dB, "
        f"at 0.1: {number(measures['psnr_at_noise_0.1_db'], 2)} dB. 8 bits cost "
        f"{number(measures['int8_loss_db'], 3)} dB with a scale for each channel of an image, "
        f"{number(measures['int8_in_blocks_loss_db'], 3)} dB with one for each 16 x 16 cells. "
        f"Equivariance errors, which say little and are not judged by: {shown or 'not measured'}.",
    )
    caption = "The middle of the median image, decoded from disturbed latents."
    page.pictures([tuple(p) for p in strips["noise"]], caption, zoom)


def _training(page: Page, training: Mapping[str, Any]) -> None:
    curves = training["curves"]
    page.section("Training", f"From the metrics.jsonl of {training['run']}.")
    labels = {
        "nll": "nll, nats an image",
        "kl": "KL, nats an image",
        "psnr": "PSNR, dB",
        "lr": "learning rate",
    }
    panels = []
    for key, label in labels.items():
        if key not in curves:
            continue
        steps, values = zip(*curves[key], strict=True)
        with plot_style():
            figure, axes = panel(xlabel="step", ylabel=label)
            axes.plot(steps, values, color=OURS, marker="o" if len(steps) < 30 else None, markersize=3)
            if key == "kl" and min(values) > 0:
                axes.set_yscale("log")
        panels.append(
            (figure, f"{label} from {values[0]:.4g} to {values[-1]:.4g}, median {median(values):.4g}")
        )
    beta = training.get("kl_weight")
    page.plots(
        panels, "The balance of the two forces" + (f"; loss.kl_weight {beta:g}." if beta is not None else ".")
    )


def _how(page: Page, data: Mapping[str, Any]) -> None:
    page.section("How it was measured", "Definitions and sources stand in latentcodec/quality/.")
    page.table(
        ["image", "PSNR dB"],
        [[row["file"], number(row["psnr_db"], 2)] for row in data["images"]],
        "Of the window that was looked at, posterior mean, 8 bits.",
        fold=f"All {len(data['images'])} images",
    )
    page.facts({**origin_facts(data), "left out": "; ".join(data["left_out"]) or "nothing"})
