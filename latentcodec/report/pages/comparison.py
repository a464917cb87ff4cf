"""The page and the table of `bench/compare.py`: two results of one bench, with signed and coloured differences."""

from collections.abc import Mapping
from typing import Any

from latentcodec.report.page import Page

WORDS = {"better": "better", "worse": "worse", "": "within the noise"}


def build(data: Mapping[str, Any]) -> Page:
    """The page of a result of kind "compare"."""
    before, after = data["origins"]
    page = Page(
        f"Two results of {data['kind']}, compared",
        f"Before: {before['codec']}, commit {before['commit']}, {before['time']}. After: {after['codec']}, commit "
        f"{after['commit']}, {after['time']}.",
    )
    worse, better = data["regressions"], data["improvements"]
    page.headline(
        [
            (str(worse), "numbers are worse, beyond the noise", "failure" if worse else "healthy"),
            (str(better), "numbers are better, beyond the noise", "healthy" if better else ""),
            (
                str(len(data["changes"]) - worse - better),
                "changed by no more than the noise, or are only shown",
            ),
        ]
    )
    if data["differs"]:
        page.section(
            "Not the same",
            f"Beside the numbers these differ, and may be the reason: {', '.join(data['differs'])}.",
        )
    page.section("The numbers", "after - before; what lies within the noise has no colour.")
    page.table(
        *table(data), CAPTION, tones=[[*[""] * 3, change["verdict"], "", ""] for change in data["changes"]]
    )
    for key, words in (
        ("only_before", "Only in the first result"),
        ("only_after", "Only in the second result"),
    ):
        if data[key]:
            page.section(words, "; ".join(data[key]) + ".")
    page.section("Where they come from", "What each result says of itself.")
    header = ["", "before", "after"]
    page.table(header, [[key, str(before[key]), str(after[key])] for key in before], "Of the two results.")
    return page


CAPTION = (
    "noise: for a timing twice the standard error of the medians, at least 5 %; for a score half of the 95 % interval "
    "of the mean difference image by image; for a denoiser's distance twice the standard error over the seeds, at "
    "least 2 %. Where a result does not say how sure it is: 2 % of the value, of decibels at most 0.1 dB."
)


def table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, for the page and for the terminal."""
    rows = [
        [
            change["name"],
            f"{change['before']:.5g}",
            f"{change['after']:.5g}",
            f"{change['difference']:+.4g}",
            f"{change['noise']:.2g}",
            WORDS[change["verdict"]],
        ]
        for change in data["changes"]
    ]
    return ["number", "before", "after", "difference", "noise", "verdict"], rows
