"""The three regimes while they train, for the page of the classic experiments: losses, and the KL as a spring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentcodec.report.page import Page
from latentcodec.report.plots import OURS, SECOND, panel, plot_style, series

REGIMES = {"ae-2": "autoencoder, beta 0", "vae-2": "VAE, beta 1", "collapsed-2": "collapsed, beta 100"}
SQUARE = (4.8, 4.4)


def nats(value: float) -> str:
    """A KL, as short as it is clear."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 0.1 else f"{value:.3f}"


def add_training(page: Page, data: Mapping[str, Any]) -> None:
    """Curves of the three regimes of two numbers, as far as the result has them."""
    _losses(page, data)
    _spring(page, data)


def _losses(page: Page, data: Mapping[str, Any]) -> None:
    curves = {name: data["runs"][name]["curves"] for name in REGIMES}
    if not all(curves.values()):
        return
    with plot_style():
        error, axes = panel(xlabel="step", ylabel="nll, nats an image")
        told, other = panel(xlabel="step", ylabel="KL, nats an image", yscale="log")
        for index, (name, lines) in enumerate(curves.items()):
            for place, key in ((axes, "nll"), (other, "kl")):
                steps, values = zip(*lines[key], strict=True)
                style = series(index) | {"marker": None}
                place.plot(
                    steps, [max(value, 1e-4) for value in values], label=REGIMES[name], linewidth=1.2, **style
                )
        axes.legend(fontsize=8)
    page.plots(
        [
            (error, "Negative log-likelihood over the steps of three runs"),
            (told, "KL divergence over the steps of three runs"),
        ],
        "The losses while they train. The likelihood's loss falls; the KL of the VAE settles where it is worth "
        "it, that of the autoencoder is never paid for and grows, the strong one falls to nothing at once.",
    )


def _spring(page: Page, data: Mapping[str, Any]) -> None:
    followed = {name: data["runs"][name].get("followed") or [] for name in REGIMES}
    if not all(followed.values()):
        return
    with plot_style():
        pull, axes = panel(xlabel="step", ylabel="mean |mu|", xscale="symlog", yscale="log")
        width, other = panel(xlabel="step", ylabel="mean sigma", xscale="symlog", yscale="log")
        for index, (name, lines) in enumerate(followed.items()):
            steps = [line["step"] for line in lines]
            axes.plot(
                steps,
                [max(line["mean_abs_mu"], 1e-4) for line in lines],
                label=REGIMES[name],
                **series(index),
            )
            other.plot(steps, [line["mean_sigma"] for line in lines], label=REGIMES[name], **series(index))
        axes.legend(fontsize=8)
        tracks, lines_axes = panel(
            SQUARE, title="the VAE's codes as they move", xlabel="first number", ylabel="second number"
        )
        rows = [line["codes"] for line in followed["vae-2"]]
        for code in range(min(60, len(rows[0]))):
            lines_axes.plot(
                [row[code][0] for row in rows],
                [row[code][1] for row in rows],
                color=OURS,
                alpha=0.35,
                linewidth=0.8,
            )
            lines_axes.plot(*rows[-1][code], color=SECOND, marker="o", markersize=2.5)
    page.plots(
        [
            (pull, "Mean absolute mu over the steps at three values of beta"),
            (width, "Mean sigma over the steps at three values of beta"),
            (tracks, "Paths of sixty codes of the VAE during training"),
        ],
        "The spring: the same 200 held-out images, looked at while three runs train. All start from principal "
        "components, with sigma 0.01. Without a KL codes drift outward and clouds stay needles; with beta 1 they "
        "settle where both forces are equal; with beta 100 they fall to the origin and sigma to 1. Right: 60 "
        "codes of the VAE, from where they began to where they came to rest (dots).",
    )
