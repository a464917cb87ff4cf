"""How fast encode and decode are and how much memory they take: ours against diffusers' own class, in turn.

    python bench/throughput.py --codec CODEC --out FOLDER [--sizes 256 512 --batches 1 4 --dtypes bfloat16]
        [--sides ours "diffusers channels_last" "diffusers compiled" "diffusers tiled" "ONNX Runtime" OpenVINO ncnn]

CODEC is whatever `LatentCodec.from_pretrained` takes, or a JSON file with the configuration of a covered class
(`_class_name`; without it AutoencoderKL), which then gets random weights: time and memory do not depend on their
values (`bench/sd.json` has Stable Diffusion's size). Prints a table, writes a JSON file and an HTML page with plots,
and ends stdout with one line of JSON: the same data without single rounds.

All sides hold the same weights and get the same call, `vae.encode(x).latent_dist.mode()` or
`vae.decode(z).sample`. They are timed in turn, A B C A B C, after a warm-up of each, and a ratio is the median
over the rounds of the ratio within a round, because the rate of a shared machine drifts; without ours among
the sides there are no ratios. Each begins after a pause, in which the threads of the others stop spinning. A
matrix product takes its turn too: its best rate is the machine's peak, and the fewest operations that the model
can be computed with, at that rate, are the floor.

Shapes: B batch, C image channels, s raw latent channels, H W pixels, h w raw latent cells.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from latentcodec.codec import LatentCodec
from latentcodec.machine import emulation_cost, is_fast, use_cores
from latentcodec.report import results as report
from latentcodec.report.build import write_result
from latentcodec.report.pages.throughput import DIRECTIONS, table
from latentcodec.speed import peers
from latentcodec.speed.memory import measure_memory
from latentcodec.speed.operations import fewest_operations
from latentcodec.speed.sides import (
    NAN,
    NOT_OF_CLIPS,
    SIDES,
    Case,
    Measurement,
    Results,
    Setup,
    call,
    example,
    fits,
    runner,
)

USUAL = ["ours", "diffusers", "diffusers channels_last"]
PEAK_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product finds the peak rate
PAUSE, BURST = 0.05, 0.1  # seconds before and of one measurement
CASES_SHARE = 0.5  # of the time that --seconds gives; the rest is for memory


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--codec", required=True, help="folder, hub id, bundled name, or .json configuration")
    add("--out", type=Path, required=True, help="folder for the JSON and the HTML file")
    add("--sizes", type=int, nargs="+", default=[256, 512], help="pixels a side (%(default)s)")
    add("--batches", type=int, nargs="+", default=[1, 4], help="images a call (%(default)s)")
    add("--directions", choices=DIRECTIONS, nargs="+", default=DIRECTIONS, help="(both)")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtypes", choices=dtypes, nargs="+", help="(float32, and bfloat16 where the machine is fast in it)")
    add("--repeats", type=int, default=5, help="rounds; in each every side once (%(default)s)")
    add("--seconds", type=float, help="end after about as many seconds: with fewer rounds, then fewer cases")
    add("--sides", choices=SIDES, nargs="+", default=USUAL, help="(%(default)s); compiling takes minutes")
    add("--no_memory", action="store_true", help="measure time alone")
    add("--threads", type=int, help="of every side (all cores)")
    add("--max_memory", type=int, help="bytes that ours may take, weights included (half of what is free)")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="(%(default)s)")
    options = parser.parse_args(argv)
    if options.dtypes is None:
        half = ["bfloat16"] if is_fast(torch.bfloat16, options.device) else []
        options.dtypes = ["float32", *half]
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    warn_of_emulation(options)
    report.print_threads(use_cores(threads=options.threads))
    try:
        run(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"throughput.py: {error}") from error


def run(options: argparse.Namespace) -> None:
    setup = Setup(options.codec, options.device, options.max_memory)
    codec = check(setup, options)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on every side
    deadline = math.inf if options.seconds is None else time.perf_counter() + options.seconds
    results, peaks = measure_all(setup, codec, options, deadline)
    if not options.no_memory:
        measure_memory(setup, results, deadline)
    data = summary(codec, results, peaks, options)
    report.print_table(*table(data["results"]))
    files = write_result(data, options.out, report.stem([options.codec], data["hardware"], "throughput"))
    print("\n".join(["", *files.values()]))
    short = [{key: value for key, value in r.items() if key != "rounds_ms"} for r in data["results"]]
    report.print_last_line(data | {"results": short, "files": files})


def warn_of_emulation(options: argparse.Namespace) -> None:
    """Name what was asked for and is emulated here, with the measured factor that it costs."""
    for dtype in options.dtypes:
        if not is_fast(getattr(torch, dtype), options.device):
            cost = emulation_cost(getattr(torch, dtype), options.device)
            print(
                f"warning: this machine is not fast in {dtype}; a convolution takes {cost:.1f} times as long as in "
                "float32",
                file=sys.stderr,
            )


def check(setup: Setup, options: argparse.Namespace) -> LatentCodec:
    """The codec in float32. Raises `ValueError` or `OSError` naming the argument that cannot be used."""
    codec = setup.codec("float32")
    for size in options.sizes:
        if size < 1 or size % codec.downsampling_factor:
            raise ValueError(f"--sizes {size}: not a multiple of the codec's {codec.downsampling_factor}")
    for side in options.sides:
        if packages := peers.missing(side):
            raise ValueError(f"--sides {side}: install {' '.join(packages)}, or latentcodec[bench]")
        if codec.family.has_frames and side in NOT_OF_CLIPS:
            raise ValueError(
                f"--sides {side}: not for {codec.family.name}, whose networks take clips; leave it out"
            )
    if min(options.batches) < 1 or options.repeats < 1:
        raise ValueError("--batches and --repeats: at least 1")
    if options.max_memory is not None and options.max_memory < 1:
        raise ValueError(f"--max_memory {options.max_memory}: at least 1 byte")
    report.require_folder(options.out)
    return codec


# --- time and error


def measure_all(
    setup: Setup, codec: LatentCodec, options: argparse.Namespace, deadline: float
) -> tuple[Results, dict[str, float]]:
    """Every case on every side, and the machine's peak in operations per second by dtype.

    Each case gets an equal share of `CASES_SHARE` of the time up to `deadline`; one that has nothing left is left out.
    """
    sides = [side for side in SIDES if side in options.sides]
    models = {dtype: {side: setup.vae(side, dtype) for side in sides} for dtype in options.dtypes}
    reference = models.get("float32", {}).get("diffusers")  # errors are measured against it, timed or not
    if reference is None:
        reference = setup.vae("diffusers", "float32")
    cases = [
        Case(*case) for case in product(options.directions, options.dtypes, options.sizes, options.batches)
    ]
    results: Results = {}
    peaks: dict[str, float] = {}
    end = time.perf_counter() + CASES_SHARE * (deadline - time.perf_counter())
    for index, case in enumerate(progress := tqdm(cases, unit="case")):
        progress.set_description(f"{case.direction} {case.dtype} {case.batch} x {case.size} px")
        now = time.perf_counter()
        if results and now > end:
            progress.write(f"left out, since {options.seconds:g} seconds are over: {progress.desc}")
            continue
        until = now + (end - now) / (len(cases) - index)
        value = example(case, reference)
        results[case], rate = measure(case, models[case.dtype], reference, value, options.repeats, until)
        peaks[case.dtype] = max(peaks.get(case.dtype, 0.0), rate)
    return results, peaks


def measure(
    case: Case,
    models: dict[str, Any],
    reference: Any,
    value: Tensor,
    repeats: int,
    until: float = math.inf,
) -> tuple[dict[str, Measurement], float]:
    """All sides in turn, and the best rate of the matrix product that had its turn with them.

    No round begins after `until`, by `time.perf_counter`, except the first.
    """
    expected = torch.tensor(NAN, device=value.device)  # where float32 does not fit, no error is known
    if fits("diffusers", reference, case):
        expected = call(reference, case.direction, value)
    value = value.to(getattr(torch, case.dtype))
    measured = {side: Measurement() for side in models}
    runs = {side: runner(side, vae, case, value) for side, vae in models.items() if fits(side, vae, case)}
    for side, run in runs.items():
        output = run(value)
        error = output.float() - expected
        measured[side].max_error = error.abs().max().item()
        measured[side].rms_error = error.square().mean().sqrt().item()
    matrix = torch.randn(2 * [PEAK_SIDE[value.device.type]], device=value.device).to(value)
    matrix @ matrix
    products = []
    for index in range(repeats):
        if index and time.perf_counter() > until:
            break
        for side, run in runs.items():
            measured[side].seconds.append(seconds(partial(run, value), value.device))
        products.append(seconds(lambda: matrix @ matrix, value.device))
    return measured, 2 * len(matrix) ** 3 / min(products)


def seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """The time of one run with all the work it gives to the device: the mean of those that `BURST` has room for.

    Threads of other sides that still wait for work, which many do by spinning, fall asleep before it begins.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    time.sleep(PAUSE)
    start, runs = time.perf_counter(), 0
    while not runs or time.perf_counter() - start < BURST:
        run()
        wait()
        runs += 1
    return (time.perf_counter() - start) / runs


# --- the numbers


def summary(
    codec: LatentCodec, results: Results, peaks: dict[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    records = []
    for case, measured in results.items():
        floor = fewest_operations(codec.vae.config, case, codec.family.name) / peaks[case.dtype]
        records += [record(case, side, measured, floor) for side in measured]
    return {
        "bench": "throughput",
        **report.provenance(torch.device(options.device)),
        "fingerprint": None if options.codec.endswith(".json") else codec.fingerprint,
        "codec": report.short_path(options.codec),
        "weights": "random" if options.codec.endswith(".json") else "the codec's",
        "latent": f"f{codec.downsampling_factor}c{codec.latent_channels}",
        "parameters": sum(parameter.numel() for parameter in codec.vae.parameters()),
        "rounds": max(len(own.seconds) for measured in results.values() for own in measured.values()),
        "peak_tflops": {dtype: peak / 1e12 for dtype, peak in peaks.items()},
        "sides": {side: SIDES[side] for side in next(iter(results.values()))},
        "results": records,
    }


def record(case: Case, side: str, measured: dict[str, Measurement], floor: float) -> dict[str, Any]:
    own, ours = measured[side], measured.get("ours", Measurement())
    typical = median(own.seconds or [NAN])
    ratios = [
        theirs / mine for theirs, mine in zip(own.seconds, ours.seconds, strict=False)
    ]  # empty where a side failed or ours was not asked for
    return {
        **asdict(case),
        "side": side,
        "ms": 1e3 * typical,
        "images_per_s": case.batch / typical,
        "megapixels_per_s": case.megapixels / typical,
        "peak_mib": own.peak_bytes / 2**20,
        "process_mib": own.process_bytes / 2**20,
        "max_error": own.max_error,
        "rms_error": own.rms_error,
        "time_over_ours": median(ratios or [NAN]),
        "floor_ms": 1e3 * floor,
        "floor_megapixels_per_s": case.megapixels / floor,
        "rounds_ms": [1e3 * value for value in own.seconds],
    }


if __name__ == "__main__":
    main()
