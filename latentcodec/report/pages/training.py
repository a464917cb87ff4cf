"""The page and the table of `bench/training.py`: losses, quality, speed, and where a training's time went."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from latentcodec.report.page import Page
from latentcodec.report.plots import NEUTRAL, OURS, SECOND, panel, plot_style, series
from latentcodec.report.results import decibels, number, origin_facts

SHARES = {"computing": OURS, "waiting for data": SECOND, "everything else": NEUTRAL}
CURVES = {  # of metrics.jsonl, by what their axis says
    "nll": "negative log-likelihood, nats an image",
    "kl": "KL, nats an image",
    "kl_weight": "KL weight",
    "lr": "learning rate",
    "total": "total loss",
}


def build(data: Mapping[str, Any]) -> Page:
    """The page of a result of kind "training"."""
    runs = data["runs"]
    page = Page(
        "A training, measured",
        f"{', '.join(run['run'] for run in runs)} on {data['hardware']['device']}: what it learnt, how fast, and where "
        "its time went.",
    )
    for run in runs:
        page.headline(headline(run))
    page.section("Quality", "What a minute of training is worth.")
    page.plots(
        [_curves(runs, "psnr_curve", "minutes", "PSNR, dB")],
        "PSNR of the averaged weights on the run's own held-out images (posterior mode, cropped to their "
        "middle where data.val_resolution says so, 8 bits) against the minutes of training, validations and "
        "checkpoints included.",
    )
    _losses(page, runs)
    for run in runs:
        if run.get("samples"):
            page.pictures([(run["samples"], f"{run['run']}: original, reconstruction, four times the difference")],
                          "The last sample grid of the run.")  # fmt: skip
    page.section("Speed", "Whether it is as fast in the end as in the beginning.")
    page.plots(
        [_curves(runs, "speed_curve", "minutes", "images / s"), _shares(runs)],
        "Images a second of the steps alone; a point is the median of its part of the run. Waiting for data: the step "
        "had to wait for the data workers. Everything else: validations, sample grids, checkpoints, the measuring of "
        "latents for codec/.",
    )
    page.section("All runs", "One row for each.")
    page.table(*table(runs), caption=TABLE_CAPTION)
    page.section("How it was measured", "The machine, and the peak that it reached while this page was made.")
    rates = ", ".join(f"{rate:.3g} in {dtype}" for dtype, rate in data["peak_tflops"].items())
    page.facts({"peak rate, TFLOP/s": rates, **origin_facts(data)})
    return page


TABLE_CAPTION = (
    "img/s: median over the steps. overall: all images over all minutes. ceiling: images a second if the autoencoder's "
    "convolutions and matrix products, forward and backward (GFLOP/img), ran at the best rate that the matrix product "
    "or this run reached and nothing else took time. of ceiling: img/s over it. waiting, else: shares of the minutes."
)


def headline(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The four numbers of one run."""
    score = f"{_psnr(run)} dB" if run["held_out_images"] else "-"
    return [
        (score, f"{run['run']}, on {run['held_out_images']} held-out images"),
        (number(run["images_per_s"], 1), f"images a second, {run['dtype']}, in {run['minutes']:.0f} minutes"),
        (percent(min(1.0, run["share_of_peak"])), "of the ceiling"),
        (percent(run["shares"]["waiting for data"]), "of the time waiting for data"),
    ]


def table(runs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, for the page and for the terminal."""
    header = ["run", "PSNR", "SSIM", "dtype", "crops", "steps", "minutes", "img/s", "overall", "ceiling"]
    header += ["of ceiling", "waiting", "else", "GFLOP/img"]
    return header, [
        [
            run["run"],
            _psnr(run),
            number(run["ssim"], 4),
            run["dtype"],
            f"{run['images_per_step']} x {run['resolution']}\u00b2",
            str(run["steps"]),
            number(run["minutes"], 1),
            number(run["images_per_s"], 2),
            number(run["images_per_s_overall"], 2),
            number(max(run["ceiling_images_per_s"], run["images_per_s"]), 2),
            percent(min(1.0, run["share_of_peak"])),
            percent(run["shares"]["waiting for data"]),
            percent(run["shares"]["everything else"]),
            number(run["operations_per_image"] / 1e9, 1),
        ]
        for run in runs
    ]


def _psnr(run: Mapping[str, Any]) -> str:
    """That of the last validation; "-" where there was none."""
    return decibels(run["psnr"]) if run["held_out_images"] else "-"


def percent(share: float) -> str:
    """A share for a table."""
    return number(100 * share, 1) + " %"


def _losses(page: Page, runs: Sequence[Mapping[str, Any]]) -> None:
    """A panel for each loss that a run wrote; old results have none."""
    panels = []
    for key, label in CURVES.items():
        if any(run.get("loss_curves", {}).get(key) for run in runs):
            flat = [{"run": run["run"], key: run.get("loss_curves", {}).get(key) or []} for run in runs]
            panels.append(_curves(flat, key, "step", label))
    if panels:
        page.section(
            "Losses", "The two forces: the likelihood pulls codes apart, the KL pulls them together."
        )
        page.plots(panels, "Each point is the median of its part of the run.")


def _curves(runs: Sequence[Mapping[str, Any]], key: str, across: str, label: str) -> tuple[Figure, str]:
    """A line for each run, and the sentence of the panel. The axis of a few equal values is not blown up."""
    said = []
    with plot_style():
        figure, axes = panel(xlabel=across, ylabel=label)
        for index, run in enumerate(runs):
            points = [(place, value) for place, value in run[key] if value is not None]  # None: infinite
            if not points:
                continue
            places, values = zip(*points, strict=True)
            style = series(index) if len(places) < 30 else series(index) | {"marker": None}
            axes.plot(places, values, label=run["run"], **style)
            said.append(f"{run['run']} from {values[0]:.4g} to {values[-1]:.4g}")
        low, high = axes.get_ylim()
        if key == "psnr_curve" and high - low < 2:
            axes.set_ylim((low + high) / 2 - 1, (low + high) / 2 + 1)
        if key == "speed_curve":
            axes.set_ylim(bottom=0)
        if said:
            axes.legend(fontsize=8)
    return figure, f"{label} by {across}: {'; '.join(said)}"


def _shares(runs: Sequence[Mapping[str, Any]]) -> tuple[Figure, str]:
    """A bar for each run, of the shares of its time."""
    with plot_style():
        figure, axes = panel((4.8, 1.1 + 0.45 * len(runs)), xlabel="% of the time", xlim=(0, 100))
        left = [0.0] * len(runs)
        for (name, colour), hatch in zip(SHARES.items(), ("", "//", ".."), strict=True):
            widths = [100 * run["shares"][name] for run in runs]
            names = [run["run"] for run in runs]
            axes.barh(names, widths, left=left, height=0.6, color=colour, hatch=hatch, label=name)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    return figure, "; ".join(f"{run['run']}: {percent(run['shares']['computing'])} computing" for run in runs)
