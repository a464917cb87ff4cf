"""What can be said of a training: images a second, where its time went, PSNR against minutes, share of the peak.

    python bench/training.py --runs runs/a [runs/b ...] --out FOLDER

Each run is the output folder of train/train.py: its metrics.jsonl and config.yaml, and the config.json of its codec/
are read, nothing is trained. A run may be finished, stopped or resumed; one that has never ended or stopped has no
codec/ yet and is refused. Prints a table, writes a JSON file and an HTML page with
plots, and ends stdout with one line of JSON.

The peak is the best rate of a matrix product in the run's dtype, measured now and on this machine: run this where the
run ran, with as many threads, and while nothing else runs. The run's rate is its median images/s times the operations
that an image costs the autoencoder, forward and backward; a discriminator, LPIPS and the optimizer are not counted.
"""

import argparse
import json
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from latentcodec.report.page import (
    NEUTRAL,
    OURS,
    SECOND,
    SERIES,
    Page,
    hardware,
    machine_facts,
    number,
    plot_style,
    print_last_line,
    print_table,
    require_folder,
    stem,
    write,
)

DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}  # by train.mixed_precision
# Of the square matrices whose fastest product is the peak; on a busy machine only small ones are left in peace.
PEAK_SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
PEAK_SECONDS = 1.0  # for each
CURVE_POINTS = 200  # of a run's images/s, each the median of its share of the steps
SHARES = {"computing": OURS, "waiting for data": SECOND, "everything else": NEUTRAL}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", type=Path, nargs="+", required=True, help="output folders of train/train.py")
    add("--out", type=Path, required=True, help="folder for the JSON and the HTML file")
    add("--dtype", choices=DTYPES.values(), help="of runs whose precision accelerate launch chose (float32)")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="that they ran on (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    try:
        runs = [read(folder, options.dtype) for folder in options.runs]
        require_folder(options.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"training.py: {error}") from error
    peaks = {dtype: peak_rate(dtype, options.device) for dtype in {run["dtype"] for run in runs}}
    data = summary(runs, peaks, torch.device(options.device))
    print_table(*table(data["runs"]))
    if any(run["share_of_peak"] > 1 for run in data["runs"]):
        print(
            "\nmore than 100 % of the peak: the machine is busier, or another one, than when the run was made"
        )
    files = write(
        build_page(data),
        data,
        options.out,
        stem([str(folder) for folder in options.runs], data["hardware"], "training"),
    )
    print("\n".join(["", *files.values()]))
    short = [{key: value for key, value in run.items() if "curve" not in key} for run in data["runs"]]
    print_last_line(data | {"runs": short, "files": files})


# --- a run


def read(folder: Path, dtype: str | None) -> dict[str, Any]:
    """What a run's own files say. Raises `OSError` or `ValueError` naming what is missing or wrong in them."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    codec = folder / "codec" / "config.json"
    if not codec.is_file():
        raise ValueError(f"{codec} is missing: the run writes it when it ends or is stopped")
    architecture = json.loads(codec.read_text())
    whole = (folder / "metrics.jsonl").read_text().rpartition("\n")[0]  # the last line may still be half
    lines = [json.loads(line) for line in whole.splitlines()]
    steps = [line for line in lines if "images_per_second" in line]
    scores = [line for line in lines if "psnr" in line]
    if not steps:
        raise ValueError(f"{folder / 'metrics.jsonl'}: no step of a training in it")
    train, data = config["train"], config["data"]
    images = round(steps[-1]["images_per_second"] * steps[-1]["step_seconds"])  # a step's, of all processes
    seconds = 60 * max(line["minutes"] for line in steps + scores)  # the drift from a teacher has no time
    waiting = sum(step["waited_seconds"] for step in steps)
    computing = sum(step["step_seconds"] for step in steps) - waiting
    return {
        "run": str(folder),
        "steps": steps[-1]["step"],
        "images_per_step": images,
        "processes": images // (train["batch_size"] * train["accumulation"]),
        "resolution": data["resolution"],
        "minutes": seconds / 60,
        "dtype": DTYPES.get(train["mixed_precision"]) or dtype or "float32",
        "images_per_s": median(step["images_per_second"] for step in steps),
        "images_per_s_overall": images * len(steps) / seconds,
        "shares": {
            "computing": computing / seconds,
            "waiting for data": waiting / seconds,
            "everything else": max(0.0, 1 - (computing + waiting) / seconds),
        },
        "psnr": scores[-1]["psnr"] if scores else None,
        "ssim": scores[-1]["ssim"] if scores else None,
        "held_out_images": scores[-1]["images"] if scores else 0,
        "operations_per_image": operations(architecture, data["resolution"], config["model"]["part"]),
        "psnr_curve": [[line["minutes"], line["psnr"]] for line in scores],
        "speed_curve": speed_curve(steps),
    }


def operations(architecture: dict[str, Any], resolution: int, part: str) -> int:
    """Of the convolutions and matrix products of one crop, forward and backward: 2 for a multiply and its add.

    `part` is what is trained: "all", "encoder" or "decoder". Nothing is computed: the tensors have shapes only.
    """
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(architecture)
        image = torch.empty(1, architecture["in_channels"], resolution, resolution)
    vae.requires_grad_(part == "all")
    if part != "all":
        getattr(vae, part).requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        latent = vae.encode(image).latent_dist.parameters.chunk(2, dim=1)[0]
        vae.decode(latent).sample.sum().backward()
    return int(counter.get_total_flops())


def speed_curve(steps: Sequence[dict[str, Any]]) -> list[list[float]]:
    """[minutes, images/s], at most CURVE_POINTS of them."""
    width = -(-len(steps) // CURVE_POINTS)
    groups = [steps[start : start + width] for start in range(0, len(steps), width)]
    return [[group[-1]["minutes"], median(step["images_per_second"] for step in group)] for group in groups]


def peak_rate(dtype: str, device: str) -> float:
    """The best rate of a square matrix product, in operations per second."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    rates = []
    for side in PEAK_SIDES[device]:
        matrix = torch.randn(side, side, device=device).to(getattr(torch, dtype))
        matrix @ matrix
        end = time.perf_counter() + PEAK_SECONDS
        while time.perf_counter() < end:
            wait()
            start = time.perf_counter()
            matrix @ matrix
            wait()
            rates.append(2 * side**3 / (time.perf_counter() - start))
    return max(rates)


def summary(runs: list[dict[str, Any]], peaks: dict[str, float], device: torch.device) -> dict[str, Any]:
    for run in runs:
        chips = run["processes"] if device.type == "cuda" else 1  # processes share a CPU
        run["ceiling_images_per_s"] = chips * peaks[run["dtype"]] / run["operations_per_image"]
        run["share_of_peak"] = run["images_per_s"] / run["ceiling_images_per_s"]
    return {
        "bench": "training",
        "date": date.today().isoformat(),
        "hardware": hardware(device),
        "peak_tflops": {dtype: peak / 1e12 for dtype, peak in peaks.items()},
        "runs": runs,
    }


def table(runs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["run", "dtype", "crops", "steps", "minutes", "img/s", "overall", "ceiling", "of peak"]
    header += ["waiting", "else", "GFLOP/img", "PSNR", "SSIM"]
    return header, [
        [
            run["run"],
            run["dtype"],
            f"{run['images_per_step']} x {run['resolution']}\u00b2",
            str(run["steps"]),
            number(run["minutes"], 1),
            number(run["images_per_s"], 2),
            number(run["images_per_s_overall"], 2),
            number(run["ceiling_images_per_s"], 2),
            percent(run["share_of_peak"]),
            percent(run["shares"]["waiting for data"]),
            percent(run["shares"]["everything else"]),
            number(run["operations_per_image"] / 1e9, 1),
            number(run["psnr"], 2),
            number(run["ssim"], 4),
        ]
        for run in runs
    ]


def percent(share: float) -> str:
    return number(100 * share, 1) + " %"


# --- the page


def build_page(data: dict[str, Any]) -> Page:
    runs = data["runs"]
    first, names = runs[0], ", ".join(run["run"] for run in runs)
    page = Page(
        "A training, measured",
        f"{names} on {data['hardware']['device']}: how fast it trained, where its time went and what the held-out "
        "images gained by it.",
    )
    page.headline(
        [
            (number(first["images_per_s"], 1), f"images a second, {first['run']}"),
            (percent(first["share_of_peak"]), f"of the machine's {first['dtype']} peak"),
            (percent(first["shares"]["waiting for data"]), "of the time waiting for data"),
            (f"{number(first['psnr'], 2)} dB", f"on {first['held_out_images']} held-out images"),
        ]
    )
    page.section("Quality", "What a minute of training is worth.")
    page.plot(
        plot_curves(runs, "psnr_curve", "PSNR, dB"),
        "PSNR of the averaged weights on the run's own held-out images (posterior mode, whole images, 8 bits) against "
        "the minutes of training, validations and checkpoints included.",
    )
    page.section("Speed", "Whether it is as fast in the end as in the beginning.")
    page.plot(
        plot_curves(runs, "speed_curve", "images / s"),
        f"Images a second of the steps alone; a point is the median of its part of the run, at most {CURVE_POINTS} "
        "points.",
    )
    page.section("Time", "Where it went; the longer the blue, the better.")
    page.plot(
        plot_shares(runs),
        "Waiting for data: the step had to wait for the data workers. Everything else: validations, sample grids, "
        "checkpoints, the measuring of latents for codec/.",
    )
    page.section("All runs", "One row for each.")
    page.table(
        *table(runs),
        caption="img/s: median over the steps. overall: all images over all minutes. ceiling: images a second if the "
        "autoencoder's convolutions and matrix products, forward and backward (GFLOP/img), ran at the peak and nothing "
        "else took time. of peak: img/s over the ceiling. waiting, else: shares of the minutes.",
    )
    page.section("How it was measured", "The machine, and the peak that it reached while this page was made.")
    rates = ", ".join(f"{rate:.3g} in {dtype}" for dtype, rate in data["peak_tflops"].items())
    page.facts({"peak rate, TFLOP/s": rates, **machine_facts(data["hardware"]), "date": data["date"]})
    return page


def plot_curves(runs: Sequence[dict[str, Any]], key: str, label: str) -> Figure:
    """A line for each run against its minutes."""
    with plot_style():
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        panel = figure.subplots()
        for index, run in enumerate(runs):
            minutes, values = zip(*run[key], strict=True) if run[key] else ((), ())
            style = "o-" if len(minutes) < 30 else "-"
            panel.plot(minutes, values, style, color=SERIES[index % len(SERIES)], label=run["run"])
        panel.set(xlabel="minutes of training", ylabel=label)
        panel.set_xlim(left=0)
        if key == "speed_curve":
            panel.set_ylim(bottom=0)
        panel.legend()
    return figure


def plot_shares(runs: Sequence[dict[str, Any]]) -> Figure:
    """A bar for each run, of the shares of its time."""
    with plot_style():
        figure = Figure(figsize=(9.6, 1.1 + 0.45 * len(runs)), layout="constrained")
        panel = figure.subplots()
        left = [0.0] * len(runs)
        for name, colour in SHARES.items():
            widths = [100 * run["shares"][name] for run in runs]
            panel.barh([run["run"] for run in runs], widths, left=left, height=0.6, color=colour, label=name)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        panel.set(xlabel="% of the time", xlim=(0, 100))
        panel.invert_yaxis()
        panel.grid(visible=False, axis="y")
        figure.legend(loc="outside upper left", ncols=len(SHARES))
    return figure


if __name__ == "__main__":
    main()
