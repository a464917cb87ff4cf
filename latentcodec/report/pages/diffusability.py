"""The page and the table of `bench/diffusability.py`: how well a small denoiser learns each codec's latents."""

from collections.abc import Mapping
from typing import Any

from latentcodec.report.page import Page
from latentcodec.report.plots import INK, NEUTRAL, OURS, SECOND, THIRD, panel, plot_style
from latentcodec.report.results import number, origin_facts


def build(data: Mapping[str, Any]) -> Page:
    """The page of a result of kind "diffusability"."""
    codecs = data["codecs"]
    page = Page(
        "What a small denoiser makes of the latents",
        f"{', '.join(entry['codec'] for entry in codecs)}: the same denoiser, {data['budget']['steps']:,} steps of "
        f"{data['budget']['batch']} on {data['train']} crops, {data['budget']['seeds']} seeds. Distances in "
        f"{data['features']}: this is no FID.",
    )
    page.headline([_card(entry) for entry in codecs])
    if data["setting"] == "smoke":
        page.section("A smoke run", "It shows that everything runs. Its numbers say nothing of a codec.")
    with plot_style():
        figure, axes = panel(
            (6.4, 1.2 + 0.5 * len(codecs)), xlabel="Frechet distance, % of the reference's variance"
        )
        for place, entry in enumerate(codecs):
            axes.plot([entry["floor"], entry["noise"]], [place, place], color=NEUTRAL, linewidth=1)
            for key, colour, marker in (
                ("floor", THIRD, "|"),
                ("gaussian", SECOND, "D"),
                ("noise", NEUTRAL, "x"),
            ):
                axes.plot([entry[key]], [place], color=colour, marker=marker, linestyle="none", markersize=9,
                          label=LABELS[key] if place == 0 else None)  # fmt: skip
            axes.plot(entry["seeds"], [place] * len(entry["seeds"]), color=OURS, marker="o", linestyle="none",
                      label="the model, by seed" if place == 0 else None)  # fmt: skip
        axes.set_yticks(range(len(codecs)), [entry["codec"] for entry in codecs], color=INK)
        figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    page.plot(
        figure,
        CAPTION,
        "; ".join(f"{e['codec']}: {e['distance']:.1f}, Gaussian {e['gaussian']:.1f}" for e in codecs),
    )
    page.table(*table(data), caption="skill: 0 is the Gaussian, 1 what a perfect model would draw.")
    if data.get("samples"):
        page.section("Samples", "Of the first seed, not chosen.")
        page.pictures([tuple(picture) for picture in data["samples"]], "")
    page.section("How it was measured", "The configuration of this run, for whoever repeats it.")
    page.facts(
        {**data["budget"], "images": data["folder"], "held out": data["held_out"], **origin_facts(data)}
    )
    return page


LABELS = {
    "floor": "what a perfect model would draw",
    "gaussian": "a Gaussian of the same covariance",
    "noise": "noise",
}
CAPTION = (
    "Shorter is better. A perfect model would draw what the codec makes of the crops that were learnt from. A model to "
    "the right of its Gaussian has learnt nothing that a covariance does not know: train longer before comparing "
    "codecs by it. Gaps smaller than the spread of the seeds are noise."
)


def _card(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    if entry["distance"] >= entry["gaussian"]:
        return (
            "no answer",
            f"{entry['codec']}: no better than a Gaussian of the same covariance; train longer",
            "warning",
        )
    return (
        number(entry["distance"], 1),
        f"{entry['codec']}: against {entry['gaussian']:.1f} of the Gaussian",
        "healthy",
    )


def table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, for the page and for the terminal."""
    rows = [
        [e["codec"], e["latent"], *(number(e[key], 1) for key in ("floor", "distance", "spread", "gaussian", "noise")),
         number(e["skill"], 2)]
        for e in data["codecs"]
    ]  # fmt: skip
    return ["codec", "latent", "floor", "model", "+-", "Gaussian", "noise", "skill"], rows
