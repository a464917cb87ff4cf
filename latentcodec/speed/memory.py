"""The memory of every side of `bench/throughput.py`, each in a fresh process: above the loaded model, and with it."""

import ctypes
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from latentcodec.speed import peers
from latentcodec.speed.sides import NAN, Case, Results, Setup, call, fits
from latentcodec.vae.families import Config, Family, family_of

CLEAR_REFS = Path("/proc/self/clear_refs")  # where Linux resets the peak of a process; others do not
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
PASSES = {
    "cpu": 1,
    "cuda": 3,
}  # GPUs: one as it comes, one that is recorded, and one that is replayed, as they are timed


def measure_memory(setup: Setup, results: Results, deadline: float) -> None:
    """Fill in the bytes, each side in a fresh process, so that no side profits from another; none after `deadline`.

    Compiled models are left out: the memory of the compiler could not be told from theirs.
    """
    sides = {side for measured in results.values() for side in measured} - {"diffusers compiled"}
    by_size = sorted(results, key=lambda case: case.megapixels)
    for side in tqdm(sorted(sides), desc="memory", unit="side"):
        if time.perf_counter() > deadline:
            tqdm.write(f"memory of {side}: not measured, since the time is over")
            continue
        for dtype in dict.fromkeys(case.dtype for case in results):
            cases = [case for case in by_size if case.dtype == dtype]
            groups = [[case] for case in cases] if side in peers.SIDES else [cases]
            for group in groups:
                for case, found in zip(group, in_a_fresh_process(setup, side, group), strict=False):
                    results[case][side].peak_bytes, results[case][side].process_bytes = found


def in_a_fresh_process(setup: Setup, side: str, cases: Sequence[Case]) -> list[tuple[float, float]]:
    """What `peak_bytes` finds; nothing where the kernel ended the process for want of memory."""
    with tempfile.TemporaryDirectory() as folder:
        if side in peers.SIDES:
            vae = setup.vae(side, cases[0].dtype)
            if not fits(side, vae, cases[0]):
                return []
            example = inputs(family_of(vae), vae.config, cases[0])
            peers.export(side, vae, cases[0].direction, example, Path(folder))
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            arguments = setup, side, cases, torch.get_num_threads(), folder
            try:
                return process.submit(peak_bytes, *arguments).result()
            except BrokenProcessPool:
                return []


def peak_bytes(
    setup: Setup, side: str, cases: Sequence[Case], threads: int, exported: str
) -> list[tuple[float, float]]:
    """The peak of every case above the loaded model, and above the process before it was loaded; nan where it cannot
    be known.

    The model is loaded and run on small images (other runtimes: on their only size), so that weights and libraries are
    in memory; what a side keeps between calls from then on counts.
    """
    device = torch.device(setup.device)
    torch.set_num_threads(threads)
    if device.type == "cpu":
        if not os.access(CLEAR_REFS, os.W_OK):
            return [(NAN, NAN)] * len(cases)
        # glibc keeps much of what is freed, which would be counted; so it returns it to the system at once.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    vae = setup.codec(cases[0].dtype).vae
    family, config = family_of(vae), vae.config
    del vae  # before memory is looked at
    forget_peak(device)
    before = memory_in_use(device)
    if side in peers.SIDES:
        run = peers.load(side, Path(exported))
        runs = dict.fromkeys(cases, run)
    else:
        vae = setup.vae(side, cases[0].dtype)
        runs = {case: partial(call, vae, case.direction) for case in cases if fits(side, vae, case)}
    dtype = getattr(torch, cases[0].dtype)
    for case, run in runs.items():
        small = case if side in peers.SIDES else replace(case, size=32 * family.raw_factor(config), batch=1)
        for _ in range(PASSES[device.type]):
            run(inputs(family, config, small).to(device, dtype))
    forget_peak(device)
    start = memory_in_use(device)
    peaks = []
    for case in cases:
        value = inputs(family, config, case).to(device, dtype)
        forget_peak(device)
        if case in runs:
            for _ in range(PASSES[device.type]):
                runs[case](value)
        peak = memory_in_use(device, peak=True) if case in runs else NAN
        peaks.append((peak - start, peak - before))
    return peaks


def inputs(family: Family, config: Config, case: Case) -> Tensor:
    """Random images, or raw latents, of a case."""
    return torch.rand(case.shape(family, config))


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
