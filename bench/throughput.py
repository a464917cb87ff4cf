"""How fast encode and decode are and how much memory they take: ours against diffusers' own class, in turn.

    python bench/throughput.py --codec CODEC --out FOLDER [--sizes 256 512 --batches 1 4 --dtypes bfloat16]
        [--sides ours "diffusers channels_last" "diffusers compiled" "diffusers tiled"]

CODEC is whatever `LatentCodec.from_pretrained` takes, or a JSON file with the configuration of an
AutoencoderKL, which then gets random weights: time and memory do not depend on their values (`bench/sd.json`
has Stable Diffusion's size). Prints a table, writes a JSON file and an HTML page with plots, and ends stdout
with one line of JSON: the same data without single rounds.

All sides hold the same weights and get the same call, `vae.encode(x).latent_dist.mode()` or
`vae.decode(z).sample`. They are timed in turn, A B C A B C, after a warm-up of each, and a ratio is the median
over the rounds of the ratio within a round, because the rate of a shared machine drifts; without ours among
the sides there are no ratios. A matrix product takes its turn too: its best rate is the machine's peak, and the
fewest operations that the model can be computed with, at that rate, are the floor.

Shapes: B batch, C channels, H W pixels, f downsampling factor, c latent channels.
"""

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from latentcodec.adopt import build, optimize_vae
from latentcodec.codec import LatentCodec
from latentcodec.machine import emulation_cost, is_fast, use_cores
from latentcodec.report import results as report
from latentcodec.report.build import write_result
from latentcodec.report.pages.throughput import DIRECTIONS, table
from latentcodec.vae.networks import downsampling_factor

SIDES = {
    "ours": "optimize_vae(codec.vae); on GPUs with channels_last weights",
    "diffusers": "diffusers' own class as it comes: contiguous weights",
    "diffusers channels_last": "diffusers' own class with channels_last weights",
    "diffusers compiled": "channels_last and torch.compile of encoder and decoder, with freezing",
    "diffusers tiled": "channels_last and enable_tiling(): blended tiles, which give another image",
}
USUAL = ["ours", "diffusers", "diffusers channels_last"]
PEAK_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product finds the peak rate
CLEAR_REFS = Path("/proc/self/clear_refs")  # where Linux resets the peak of a process; others do not
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
NAN = float("nan")
CASES_SHARE = 0.5  # of the time that --seconds gives; the rest is for memory
MAPS_AT_ONCE = 3  # of the widest layer, that diffusers holds: input, norm and activation


@dataclass(frozen=True)
class Case:
    """One thing to be timed: `batch` square images of `size` pixels a side."""

    direction: str
    dtype: str
    size: int
    batch: int

    @property
    def megapixels(self) -> float:
        return self.batch * self.size**2 / 1e6


@dataclass
class Measurement:
    """What one side did in one case."""

    seconds: list[float] = field(default_factory=list)
    """One for every round; empty where the device had too little memory."""
    max_error: float = NAN
    """Largest absolute difference to diffusers in float32 with the same weights."""
    rms_error: float = NAN
    """The root mean square of the same differences."""
    peak_bytes: float = NAN
    """Memory above the loaded model."""


Results = dict[Case, dict[str, Measurement]]
"""By case and side."""


@dataclass(frozen=True)
class Setup:
    """What a process needs to load any side; it is sent to the processes that measure memory."""

    source: str
    device: str
    max_memory: int | None
    """Bytes that ours may take; None: as it comes."""

    def codec(self, dtype: str) -> LatentCodec:
        """Raises `ValueError` or `OSError` naming what cannot be loaded."""
        model: str | AutoencoderKL = self.source
        if self.source.endswith(".json"):
            try:
                config = json.loads(Path(self.source).read_text())
            except ValueError as error:
                raise ValueError(f"{self.source}: not a JSON file ({error})") from error
            torch.manual_seed(0)  # every process draws the same weights
            model = build(config)
        return LatentCodec.from_pretrained(model, device=self.device, dtype=getattr(torch, dtype))

    def vae(self, side: str, dtype: str) -> AutoencoderKL:
        """A model in evaluation; all sides and dtypes start from the same float32 weights."""
        if side == "ours":
            vae = optimize_vae(self.codec(dtype).vae, self.max_memory or "auto")
            if self.device == "cuda":  # where weights are read anew at each call, and these need no copy
                vae.to(memory_format=torch.channels_last)
            return vae
        ours = self.codec("float32").vae
        vae = AutoencoderKL.from_config(ours.config)
        vae.load_state_dict(ours.state_dict())
        vae.to(self.device).type(getattr(torch, dtype)).eval()  # .to(dtype) warns of modules it does not have
        if side != "diffusers":
            vae.to(memory_format=torch.channels_last)
        if side == "diffusers tiled":
            vae.enable_tiling()
        if side == "diffusers compiled":
            torch._dynamo.config.recompile_limit = 64  # a graph for each shape, however many there are
            for part in ("encoder", "decoder"):
                compiled = torch.compile(getattr(vae, part), dynamic=False, options={"freezing": True})
                setattr(vae, part, compiled)
        return vae


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--codec", required=True, help="folder, hub id, bundled name, or .json configuration")
    add("--out", type=Path, required=True, help="folder for the JSON and the HTML file")
    add("--sizes", type=int, nargs="+", default=[256, 512], help="pixels a side (%(default)s)")
    add("--batches", type=int, nargs="+", default=[1, 4], help="images a call (%(default)s)")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtypes", choices=dtypes, nargs="+", help="(float32, and bfloat16 where there are units for it)")
    add("--repeats", type=int, default=5, help="rounds; in each every side once (%(default)s)")
    add("--seconds", type=float, help="end after about as many seconds: with fewer rounds, then fewer cases")
    add("--sides", choices=SIDES, nargs="+", default=USUAL, help="(%(default)s); compiling takes minutes")
    add("--max_memory", type=int, help="bytes of activations that ours may take (half of what is free)")
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
    report.print_threads(use_cores())
    setup = Setup(options.codec, options.device, options.max_memory)
    try:
        codec = check(setup, options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"throughput.py: {error}") from error
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 on every side
    deadline = math.inf if options.seconds is None else time.perf_counter() + options.seconds
    results, peaks = measure_all(setup, codec, options, deadline)
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
                f"warning: this machine has no units for {dtype}; a convolution takes {cost:.1f} times as long as in "
                "float32",
                file=sys.stderr,
            )


def check(setup: Setup, options: argparse.Namespace) -> LatentCodec:
    """The codec in float32. Raises `ValueError` or `OSError` naming the argument that cannot be used."""
    codec = setup.codec("float32")
    for size in options.sizes:
        if size < 1 or size % codec.downsampling_factor:
            raise ValueError(f"--sizes {size}: not a multiple of the codec's {codec.downsampling_factor}")
    if min(options.batches) < 1 or options.repeats < 1:
        raise ValueError("--batches and --repeats: at least 1")
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
    cases = [Case(*case) for case in product(DIRECTIONS, options.dtypes, options.sizes, options.batches)]
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
    models: dict[str, AutoencoderKL],
    reference: AutoencoderKL,
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
    able = [side for side, vae in models.items() if fits(side, vae, case)]
    for side in able:
        output = call(models[side], case.direction, value)
        error = output.float() - expected
        measured[side].max_error = error.abs().max().item()
        measured[side].rms_error = error.square().mean().sqrt().item()
    matrix = torch.randn(2 * [PEAK_SIDE[value.device.type]], device=value.device).to(value)
    matrix @ matrix
    products = []
    for index in range(repeats):
        if index and time.perf_counter() > until:
            break
        for side in able:
            run = partial(call, models[side], case.direction, value)
            measured[side].seconds.append(seconds(run, value.device))
        products.append(seconds(lambda: matrix @ matrix, value.device))
    return measured, 2 * len(matrix) ** 3 / min(products)


def fits(side: str, vae: AutoencoderKL, case: Case) -> bool:
    """Whether a side's feature maps fit into the free memory; asked first, since Linux ends who asks for too much."""
    if side in ("ours", "diffusers tiled"):
        return True
    widths = vae.config.block_out_channels
    channels = widths[0] if case.direction == "encode" else max(widths[:2])
    needed = MAPS_AT_ONCE * channels * case.batch * case.size**2 * vae.dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if vae.device.type == "cuda" else psutil.virtual_memory().available
    return needed < free


def seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """The time of one run with all the work it gives to the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


@torch.no_grad()
def call(vae: AutoencoderKL, direction: str, value: Tensor) -> Tensor:
    """What a pipeline does: images to the posterior's mode, or latents to images."""
    return vae.encode(value).latent_dist.mode() if direction == "encode" else vae.decode(value).sample


def example(case: Case, reference: AutoencoderKL) -> Tensor:
    """Soft blots [B, C, H, W] in [-1, 1], or their latents: nearer to photographs than noise would be.

    The latents are those of a small picture, resized, because a large one might not fit into memory.
    """
    f = downsampling_factor(reference.config)
    size = case.size if case.direction == "encode" else min(case.size, 16 * f)
    shape = case.batch, reference.config.in_channels, 8, 8
    blots = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(reference.device)
    x = F.interpolate(blots, size=(size, size), mode="bilinear") * 2 - 1
    if case.direction == "encode":
        return x
    return F.interpolate(call(reference, "encode", x), size=(case.size // f, case.size // f), mode="bilinear")


# --- memory


def measure_memory(setup: Setup, results: Results, deadline: float) -> None:
    """Fill in `peak_bytes`, each side in a fresh process, so that no side profits from another; none after `deadline`.

    Compiled models are left out: the memory of the compiler could not be told from theirs.
    """
    sides = {side for measured in results.values() for side in measured} - {"diffusers compiled"}
    dtypes = dict.fromkeys(case.dtype for case in results)
    by_size = sorted(results, key=lambda case: case.megapixels)
    for side in tqdm(sorted(sides), desc="memory", unit="side"):
        if time.perf_counter() > deadline:
            tqdm.write(f"memory of {side}: not measured, since the time is over")
            continue
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            for dtype in dtypes:
                cases = [case for case in by_size if case.dtype == dtype]
                try:
                    peaks = process.submit(peak_bytes, setup, side, cases).result()
                except BrokenProcessPool:  # the kernel ended it for want of memory
                    break
                for case, peak in zip(cases, peaks, strict=True):
                    results[case][side].peak_bytes = peak


def peak_bytes(setup: Setup, side: str, cases: Sequence[Case]) -> list[float]:
    """The peak of every case above the loaded model, in this process; nan where it cannot be known.

    The model is loaded and run once on small images, so that weights and libraries are in memory; what a side
    keeps between calls from then on counts.
    """
    device = torch.device(setup.device)
    if device.type == "cpu":
        if not os.access(CLEAR_REFS, os.W_OK):
            return [NAN] * len(cases)
        # glibc keeps much of what is freed, which would be counted; so it returns it to the system at once.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    vae = setup.vae(side, cases[0].dtype)
    f = downsampling_factor(vae.config)
    shapes = {"encode": (vae.config.in_channels, 1), "decode": (vae.config.latent_channels, f)}

    def peak(case: Case, size: int, batch: int, start: int) -> float:
        channels, cell = shapes[case.direction]
        value = torch.rand(batch, channels, size // cell, size // cell, device=device, dtype=vae.dtype)
        if not fits(side, vae, case):
            return NAN
        forget_peak(device)
        call(vae, case.direction, value)
        return memory_in_use(device, peak=True) - start

    for case in cases:
        peak(case, 32 * f, 1, start=0)  # large enough for ours to be compiled
    forget_peak(device)
    start = memory_in_use(device)
    return [peak(case, case.size, case.batch, start) for case in cases]


def forget_peak(device: torch.device) -> None:
    """Let the peak begin anew, from what is really in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")


def memory_in_use(device: torch.device, peak: bool = False) -> int:
    """Bytes in use now, or at most since `forget_peak`: allocated on a GPU, resident in memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0])


# --- the numbers


def operations(config: Mapping[str, Any], case: Case) -> int:
    """The fewest operations of the model's convolutions and matrix products: 2 for a multiplication and its addition.

    Of the nine taps of a convolution after nearest-neighbour doubling four are enough (`convolutions.py`).
    """
    cells = case.size // downsampling_factor(config)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
        if case.direction == "encode":
            value = torch.empty(case.batch, config["in_channels"], case.size, case.size)
        else:
            value = torch.empty(case.batch, config["latent_channels"], cells, cells)
    with FlopCounterMode(display=False) as counter:
        call(vae, case.direction, value)
    saved = 0
    if case.direction == "decode":
        for power, channels in enumerate(reversed(config["block_out_channels"][1:]), start=1):
            saved += 2 * (9 - 4) * channels**2 * case.batch * (cells << power) ** 2
    return counter.get_total_flops() - saved


def summary(
    codec: LatentCodec, results: Results, peaks: dict[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    records = []
    for case, measured in results.items():
        floor = operations(codec.vae.config, case) / peaks[case.dtype]
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
        "max_error": own.max_error,
        "rms_error": own.rms_error,
        "time_over_ours": median(ratios or [NAN]),
        "floor_ms": 1e3 * floor,
        "floor_megapixels_per_s": case.megapixels / floor,
        "rounds_ms": [1e3 * value for value in own.seconds],
    }


if __name__ == "__main__":
    main()
