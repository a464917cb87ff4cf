"""The page of the classic experiments: what a VAE is, what its two forces do, and every claim with its number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from latentcodec.report.page import Page
from latentcodec.report.pages.classic_claims import SWEEP, claims, looked_at
from latentcodec.report.pages.classic_regimes import add_map, add_more_numbers, add_regimes
from latentcodec.report.pages.classic_training import REGIMES, nats
from latentcodec.report.plots import NEUTRAL, OURS, SECOND, SERIES, THIRD, panel, plot_style, series
from latentcodec.report.results import number, origin_facts


def build(data: Mapping[str, Any]) -> Page:
    """The page of a result of kind "classic_vae"."""
    found = claims(data)
    held = sum(claim.held for claim in found)
    page = Page(
        "The classic VAE experiments",
        f"Sixteen small VAEs on {data['set']}, {data['core_minutes']:.0f} core-minutes. {held} of {len(found)} "
        "claims of five introductions held here; the last table has each with its number.",
    )
    kl = {name: data["runs"][name]["looked"]["kl_nats"] for name in REGIMES}
    page.headline(
        [(f"{nats(kl[name])} nats", f"KL of the {text}") for name, text in REGIMES.items()]
        + [(f"{held} of {len(found)}", "claims held")]
    )
    _two_forces(page, data)
    _before(page, data)
    _told(page, data)
    add_regimes(page, data)
    add_map(page, data)
    add_more_numbers(page, data)
    _pixel_scale(page, data)
    _likelihoods(page, data)
    _sweep(page, data)
    _few(page, data)
    _claims(page, data)
    return page


def _two_forces(page: Page, data: Mapping[str, Any]) -> None:
    page.section(
        "Two forces",
        "An encoder makes a few numbers of an image: not one point, but a small cloud with a mean mu and a spread "
        "sigma. A decoder makes an image of a point drawn from that cloud. Two forces shape them. The reconstruction "
        "error pushes the clouds of different images apart and makes them small, so that the decoder can tell them "
        "apart. The KL divergence pulls every cloud toward one and the same, N(0, I): mean 0, spread 1. What is "
        "minimised is "
        "reconstruction + beta x KL, both as sums in nats over an image. Without the second force there is an "
        "autoencoder; with too much of it the first gives up.",
    )
    page.pictures([(data["data_picture"], "held-out images")], f"The data: {data['set']}.", 0)
    page.section(
        "Which beta is meant",
        "Introductions scale the error differently, so their 'beta = 1' differ. Here pixels lie in [-1, 1] and "
        "the error is sum (x - y)^2 / (2 s^2). Sigma = 1 on pixels in [0, 1] is our loss.scale 2. A plain sum of "
        "squares on [0, 1], without the half, is our loss.scale 1.4142. Ours with scale 1 weighs the error twice "
        "as much as that. Only beta x s^2 counts.",
    )


def _before(page: Page, data: Mapping[str, Any]) -> None:
    basics = data["basics"]
    page.section(
        "E0: before any training",
        "Why mu + sigma x noise? A drawn number has no derivative with respect to the mean that it was drawn "
        "from. Written as mean + sigma x noise it has: 1. And why squared error? It is the negative logarithm of "
        "a gaussian around the decoder's output, up to a constant.",
    )
    through, numbers = basics["gradients"], basics["numbers"]
    rows = [
        *([f"gradient through {name}", "none" if g is None else f"{g:.3f}"] for name, g in through.items()),
        ["squared error - gaussian, largest", f"{basics['likelihood']['largest_difference']:.1e}"],
        *(
            [f"numbers, {d} dimensions", f"{n['diagonal']} diagonal, {n['whole']} whole"]
            for d, n in numbers.items()
        ),
    ]
    page.table(["what", "result"], rows, "The gradient of the mean of z^2 at mean 0.5, which is 1.")


def _told(page: Page, data: Mapping[str, Any]) -> None:
    page.section(
        "Told before training",
        "A linear VAE has a solution in closed form. Along each principal direction of the images, with variance "
        "l, it lives if l > v = beta s^2, tells (1/2) ln(l / v) nats, and has sigma = sqrt(v / l). Deep VAEs "
        "begin to collapse at the same v. These numbers were printed before the first step.",
    )
    variances = data["theory"]["variances"][:60]
    with plot_style():
        figure, axes = panel(xlabel="principal direction", ylabel="variance", yscale="log")
        axes.plot(range(1, len(variances) + 1), variances, color=OURS, marker="o", markersize=3)
        for index, v in enumerate((1, 10, 100)):
            axes.axhline(v, color=SERIES[index + 1], linestyle="--", linewidth=1, label=f"v = {v}")
        axes.legend(fontsize=8)
    first = variances[0]
    page.plot(
        figure,
        f"The images' variances along their principal directions; the first is {first:.1f}. What lies below a dashed "
        f"line is not worth its nats at that v; from v = {first:.1f} on nothing is.",
    )
    rows = []
    for name, told in data["theory"]["runs"].items():
        looked = looked_at(data, name)
        rows.append([
            name, f"{told['noise']:g}", f"{told['alive']} of {told['latents']}",
            f"{looked['active']} of {told['latents']}",
            "infinite" if told["kl"] in (None, math.inf) else f"{told['kl']:.1f}", f"{looked['kl_nats']:.1f}",
            f"{told['squared_error']:.0f}", f"{looked['drawn_squared_error']:.0f}",
        ])  # fmt: skip
    page.table(
        ["run", "v", "alive, told", "alive, found", "KL, told", "KL, found", "error, told", "error, found"],
        rows,
        "KL in nats an image; error: summed squares of decoded draws. A deep decoder may beat the linear error, "
        "since digits bend; a short training may not have come to its end. Alive, found: numbers that tell 0.01 "
        "nats or more.",
    )


def _pixel_scale(page: Page, data: Mapping[str, Any]) -> None:
    sigma, fixed, learned = (
        data["runs"]["pixel-scale"]["sigma"],
        looked_at(data, "vae-16"),
        looked_at(data, "pixel-scale"),
    )
    page.section(
        "E2: a variance for each pixel, and how it cheats",
        "The likelihood's sigma may be learned, even for each pixel of each image: loss.scale per_pixel. The "
        "decoder then may lower its loss by drawing well, or by saying 'here I do not know'. Where nothing ever "
        "changes it claims to be certain, which pays without end (so sigma is kept above one of 256 levels); "
        "where strokes may be it calls them noise.",
    )
    page.pictures(
        [(sigma["picture"], "images, reconstructions, sigma, error")],
        f"From top to bottom. Sigma is {sigma['on_strokes']:.2f} where strokes are and {sigma['elsewhere']:.3f} "
        f"elsewhere; its correlation with the error is {sigma['correlation']:.2f}.",
        0,
    )
    page.table(
        ["run", "PSNR", "sharpness", "KL", "active"],
        [
            [
                text,
                f"{run['psnr_db']:.2f}",
                f"{run['sharpness']:.2f}",
                f"{run['kl_nats']:.1f}",
                f"{run['active']} of 16",
            ]
            for text, run in (("one fixed sigma", fixed), ("a sigma for each pixel", learned))
        ],
        "Both with sixteen numbers and beta 1. The learned sigma has the lower loss, and the worse pictures: its "
        "nats go where it claims to be certain, not where strokes are.",
    )


def _likelihoods(page: Page, data: Mapping[str, Any]) -> None:
    names = {"vae-16": "gaussian", "bernoulli": "Bernoulli", "laplace": "Laplace"}
    page.section(
        "E3: what the likelihood does to sharpness",
        "The likelihood says which errors hurt. Squared error (gaussian) makes the decoder put out the mean of "
        "all that the image may be, which blurs edges that it is not sure of; absolute error (Laplace) the "
        "median; cross-entropy (Bernoulli) a probability. The spectrum shows the blur: how much energy is left "
        "at each frequency.",
    )
    reference = data["data_power"]
    with plot_style():
        figure, axes = panel(xlabel="cycles an image", ylabel="energy over that of the images")
        for index, (name, text) in enumerate(names.items()):
            ratio = [a / b for a, b in zip(looked_at(data, name)["radial_power"], reference, strict=True)]
            axes.plot(range(1, len(ratio) + 1), ratio, label=text, **series(index))
        axes.axhline(1, color=NEUTRAL, linestyle=":", linewidth=1)
        axes.legend(fontsize=8)
    sharp = ", ".join(f"{text} {looked_at(data, name)['sharpness']:.2f}" for name, text in names.items())
    page.plot(figure, f"1: as sharp as the images. Energy above half the band: {sharp}.")
    page.table(
        ["likelihood", "PSNR", "sharpness", "KL", "active", "draws like data"],
        [
            [text, number(run["psnr_db"], 2), number(run["sharpness"], 2), number(run["kl_nats"], 1),
             f"{run['active']} of 16", f"{run['draw_precision']:.0%}"]
            for text, run in ((text, looked_at(data, name)) for name, text in names.items())
        ],
        "The same network, sixteen numbers, beta 1. They weigh the error differently against the KL, so they spend "
        "different nats: part of what is seen is that.",
    )  # fmt: skip
    page.pictures(
        [(looked_at(data, name)["reconstructions"], text) for name, text in names.items()],
        "Images and reconstructions.",
        0,
    )


def _sweep(page: Page, data: Mapping[str, Any]) -> None:
    page.section(
        "E4: the balance",
        "Beta from 0.01 to 100 with sixteen numbers. Each run is a point: what the codes tell (KL) against what "
        "is lost (the squared error of decoded draws). The line is linear theory, drawn before training.",
    )
    runs = sorted((data["runs"][name]["kl_weight"], name) for name in SWEEP)
    told = data["theory"]["runs"]
    with plot_style():
        figure, axes = panel(xlabel="KL, nats an image", ylabel="squared error an image")
        line = [(told[name]["kl"], told[name]["squared_error"]) for _, name in runs]
        axes.plot(*zip(*line, strict=True), color=NEUTRAL, linestyle="--", marker="x", label="linear theory")
        points = [
            (looked_at(data, name)["kl_nats"], looked_at(data, name)["drawn_squared_error"])
            for _, name in runs
        ]
        axes.plot(*zip(*points, strict=True), label="trained", **series(0))
        for (beta, _), (x, y) in zip(runs, points, strict=True):
            axes.annotate(f"{beta:g}", (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
        axes.axhline(data["variance"], color=SECOND, linestyle=":", linewidth=1, label="the mean image alone")
        axes.legend(fontsize=8)
        spread, other = panel(xlabel="beta", xscale="log")
        betas = [beta for beta, _ in runs]
        for index, (key, text) in enumerate((("mean_sigma", "mean sigma"), ("mean_square_mu", "mean mu^2"))):
            other.plot(betas, [looked_at(data, name)[key] for _, name in runs], label=text, **series(index))
        other.plot(
            betas,
            [told[name]["posterior_std"] for _, name in runs],
            color=THIRD,
            linestyle=":",
            label="sigma, told (alive ones)",
        )
        other.legend(fontsize=8)
    page.plots(
        [
            (figure, "Rate-distortion curve of the sweep of beta, beside linear theory"),
            (spread, "Mean sigma and mean mu^2 against beta"),
        ],
        "Numbers at the points are beta. Right: the KL pulls sigma to 1 and mu to 0.",
    )


def _few(page: Page, data: Mapping[str, Any]) -> None:
    page.section(
        "E5: 500 images",
        "With few images a network can learn them by heart. What the KL takes away is room to do so.",
    )
    rows = []
    for name, text in (("few-ae", "autoencoder"), ("few-vae", "VAE")):
        run = looked_at(data, name)
        gap = run["train_psnr_db"] - run["psnr_db"]
        rows.append(
            [
                text,
                f"{run['train_psnr_db']:.2f}",
                f"{run['psnr_db']:.2f}",
                f"{gap:.2f}",
                f"{run['kl_nats']:.1f}",
            ]
        )
    page.table(
        ["500 images", "training, dB", "held out, dB", "gap, dB", "KL"], rows, "PSNR of decoded means."
    )
    bounds = data["runs"]["vae-2"].get("bounds")
    if bounds:
        text = ", ".join(
            f"{value:.2f} with {k}" for k, value in sorted(bounds.items(), key=lambda item: int(item[0]))
        )
        page.section(
            "The evidence lower bound",
            f"One draw from the posterior bounds ln p(x) from below; the mean of several, importance-weighted, comes "
            f"nearer (Burda et al. 2016). Nats an image, VAE with two numbers: {text} draws.",
        )


def _claims(page: Page, data: Mapping[str, Any]) -> None:
    cut = [name for name, run in data["runs"].items() if run["steps"] < run.get("planned_steps", 0)]
    page.section(
        "Every claim, and whether it held",
        "000: questions and answers. 001: a small VAE on MNIST. 002: VAEs and Stable Diffusion. 003: slides. 004: a "
        "notebook on Fashion-MNIST. What did not hold here may hold in a longer training, or may need care."
        + (f" Cut off by the clock, so that little can be said of them: {', '.join(cut)}." if cut else ""),
    )
    found = claims(data)
    page.table(
        ["claim", "from", "experiment", "measured", "held"],
        [[c.text, c.source, c.experiment, c.measured, "held" if c.held else "did not hold"] for c in found],
        "Limits stand in latentcodec/report/pages/classic_claims.py.",
        tones=[["", "", "", "", "better" if c.held else "worse"] for c in found],
    )
    rows = [
        [
            name,
            *(str(run[key]) for key in ("numbers", "kl_weight", "likelihood")),
            f"{run['steps']} of {run.get('planned_steps', run['steps'])}",
            f"{run['cpu_seconds']:.0f}",
        ]
        for name, run in data["runs"].items()
    ]
    header = ["run", "numbers", "beta", "likelihood", "steps", "CPU seconds"]
    page.table(header, rows, "Configurations: experiments/classic_vae/configs.", fold="All runs")
    page.facts(
        origin_facts(data) | {"images": f"{data['images'][0]:,} trained on, {data['looked_at']} looked at"}
    )
