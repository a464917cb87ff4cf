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
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from PIL import Image

from latentcodec.report import results as report
from latentcodec.report.build import write_result
from latentcodec.report.inspection import training_curves
from latentcodec.report.pages.training import table
from latentcodec.report.pictures import data_url
from latentcodec.speed.operations import training_operations
from latentcodec.vae_config import class_named_in

DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}  # by train.mixed_precision
# Of the square matrices whose fastest product is the peak; on a busy machine only small ones are left in peace.
PEAK_SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
PEAK_SECONDS = 1.0  # for each
CURVE_POINTS = 200  # of a run's images/s, each the median of its share of the steps
LARGEST_SAMPLES = 900  # pixels a side of the sample grid that goes into the result


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
        run(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"training.py: {error}") from error


def run(options: argparse.Namespace) -> None:
    runs = [read(folder, options.dtype) for folder in options.runs]
    report.require_folder(options.out)
    peaks = {dtype: peak_rate(dtype, options.device) for dtype in {run["dtype"] for run in runs}}
    data = summary(runs, peaks, torch.device(options.device))
    report.print_table(*table(data["runs"]))
    if any(run["share_of_peak"] > 1 for run in data["runs"]):
        print(
            "\nmore than 100 % of the peak: the machine is busier, or another one, than when the run was made; "
            "the run's own rate is the ceiling"
        )
    name = report.stem([str(folder) for folder in options.runs], data["hardware"], "training")
    files = write_result(data, options.out, name)
    print("\n".join(["", *files.values()]))
    large = ("curve", "samples")
    short = [{k: v for k, v in run.items() if not any(word in k for word in large)} for run in data["runs"]]
    report.print_last_line(data | {"runs": short, "files": files})


# --- a run


def read(folder: Path, dtype: str | None) -> dict[str, Any]:
    """What a run's own files say. Raises `OSError` or `ValueError` naming what is missing or wrong in them."""
    try:
        return _read(folder, dtype)
    except (ArithmeticError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        if str(folder) in str(error):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        files = "config.yaml, codec/config.json or metrics.jsonl"
        raise ValueError(f"{folder}: {files} has been edited or is damaged ({said})") from error


def _read(folder: Path, dtype: str | None) -> dict[str, Any]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    codec = folder / "codec" / "config.json"
    if not codec.is_file():
        raise ValueError(f"{codec} is missing: the run writes it when it ends or is stopped")
    architecture = json.loads(codec.read_text())
    if not isinstance(architecture, dict):
        raise ValueError(f"{codec} is not a JSON object")
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
        "run": report.short_path(str(folder)),
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
        "operations_per_image": training_operations(
            architecture,
            data["resolution"],
            config["model"]["part"],
            class_named_in(architecture, str(codec)),
        ),
        "psnr_curve": [[line["minutes"], line["psnr"]] for line in scores],
        "speed_curve": speed_curve(steps),
        "loss_curves": (training_curves(folder) or {}).get("curves", {}),
        "samples": last_samples(folder),
    }


def last_samples(folder: Path) -> str | None:
    """The last sample grid of a run, its left part if it is wide, as a data URL; None where there is none."""
    grids = sorted((folder / "samples").glob("step-*.png"))
    if not grids:
        return None
    with Image.open(grids[-1]) as image:
        return data_url(
            image.crop((0, 0, min(image.width, LARGEST_SAMPLES), min(image.height, LARGEST_SAMPLES)))
        )


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
        **report.provenance(device),
        "peak_tflops": {dtype: peak / 1e12 for dtype, peak in peaks.items()},
        "runs": runs,
    }


if __name__ == "__main__":
    main()
