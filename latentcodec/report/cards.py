"""A result as others read it: a section of a model card, and the evaluation block that the Hugging Face hub shows.

Both are written from the JSON of `bench/reconstruction.py` or `latentcodec inspect`, so that no number is typed.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from latentcodec.report.page import LEVELS
from latentcodec.report.pages.inspection import TITLES
from latentcodec.report.results import decibels, number, signed

METRICS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}


def card_section(data: Mapping[str, Any]) -> str:
    """Markdown for a model card. Raises ValueError for a kind of result that says nothing of one codec."""
    match data["bench"]:
        case "reconstruction":
            return _reconstruction(data)
        case "inspect":
            return _inspection(data)
        case kind:
            raise ValueError(f"a model card takes results of reconstruction and inspect, not of {kind}")


def evaluation_block(data: Mapping[str, Any]) -> str:
    """YAML for the metadata of a model card: `model-index`, as the hub reads it. Of a reconstruction result."""
    if data["bench"] != "reconstruction":
        raise ValueError(f"an evaluation block takes a result of reconstruction, not of {data['bench']}")
    models = []
    for entry in data["codecs"]:
        values = {name: entry[name]["mean"] for name in METRICS}
        metrics = [
            {"type": name, "name": METRICS[name], "value": round(value, 4)}
            for name, value in values.items()
            if value is not None
        ]
        result = {
            "task": {"type": "image-to-image", "name": "Image reconstruction"},
            "dataset": {"type": "images", "name": f"{data['folder']}, {data['evaluated']} images"},
            "metrics": metrics,
        }
        models.append({"name": entry["codec"], "results": [result]})
    return yaml.safe_dump({"model-index": models}, sort_keys=False, allow_unicode=True)


def _reconstruction(data: Mapping[str, Any]) -> str:
    rows = [
        f"| {e['codec']} | {e['latent']} | {decibels(e['psnr']['mean'])} | {signed(e['psnr_over_klt'], 2)} | "
        f"{number(e['ssim']['mean'], 4)} | {number(e['lpips']['mean'], 4)} |"
        for e in data["codecs"]
    ]
    return "\n".join(
        [
            "## Reconstruction",
            "",
            f"{data['evaluated']} images of {data['folder']}; {data['protocol']}. {data['lpips']}.",
            "",
            "| codec | latent | PSNR dB | over the KLT | SSIM | LPIPS |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            _origin(data),
        ]
    )


def _inspection(data: Mapping[str, Any]) -> str:
    lines = [
        "## Latents",
        "",
        f"Judged by `latentcodec inspect` on {data['measures']['images']} images of {data['folder']}.",
        "",
    ]
    for key, verdict in data["verdicts"].items():
        lines.append(f"- {TITLES[key]}: **{LEVELS[verdict['level']][0].lower()}**")
        lines += [f"  - {reason['text']}" for reason in verdict["reasons"]]
    return "\n".join([*lines, "", _origin(data)])


def _origin(data: Mapping[str, Any]) -> str:
    device = data["hardware"]["device"]
    moment = data.get("time") or data.get("date", "at an unknown time")
    return f"Measured {moment} on {device}, commit {data.get('commit') or 'not recorded'}."
