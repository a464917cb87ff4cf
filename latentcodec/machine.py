"""What this machine does fast: in which number format, on how many cores, with which instructions.

`fast_dtype` is the one place that decides between bfloat16 and float32, `training_dtype` for training. Libraries
answer another question: torch and oneDNN call bfloat16 "supported" where they emulate it, which on an AVX2 processor
takes nine times as long as float32. Here a format counts as fast if the hardware has units for it that gain something,
and if nobody has switched them off.

Settings from outside: LATENTCODEC_DTYPE (float32 or bfloat16) takes the place of the decision; ONEDNN_MAX_CPU_ISA is
oneDNN's own, and what it switches off is not there.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from latentcodec.control_groups import processor_limits

OVERRIDE = "LATENTCODEC_DTYPE"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# oneDNN's names for the instructions it may use, weakest first, and what an x86 processor adds with each of them. Names
# that are not listed (DEFAULT, ALL, later processors) allow everything.
ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # the second is the older name of the first
X86_LEVELS = {
    "SSE41": "sse4_1",
    "AVX": "avx",
    "AVX2": "avx2",
    "AVX2_VNNI": "avx_vnni",
    "AVX2_VNNI_2": "avx_ne_convert",  # converts bfloat16, but computes in float32
    "AVX512_CORE": "avx512f",
    "AVX512_CORE_VNNI": "avx512_vnni",
    "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_FP16": "avx512_fp16",
    "AVX512_CORE_AMX": "amx_bf16",
    "AVX512_CORE_AMX_FP16": "amx_fp16",
}
# Instructions for bfloat16 are not all a gain. An Intel Xeon without AMX took 1.5 to 2.0 times as long as in float32
# with those of AVX-512 (2026-12-01: oneDNN's convolutions, both ways; engine and training fell behind as much). An AMD
# Zen 4 was as fast as in float32, with half the memory.
AMX, AVX512, AVX512_VENDOR = (
    "amx_bf16",
    "avx512_bf16",
    "AuthenticAMD",
)  # whose AVX-512 counts as fast in bfloat16
ARM_FLAGS = ("asimd", "sve", "sve2", "i8mm", "bf16")  # bf16: multiplies bfloat16
REAL_GAIN = 1.2  # times faster than float32 that bfloat16 must be where only a measurement can tell
TRIALS = 3  # of which the fastest counts
CPUINFO = Path("/proc/cpuinfo")
TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology"


# --- the device


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name; without one the GPU, or the CPU where there is none.

    Raises ValueError for a name that is none, and for a GPU that is not here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r}: there is no such device, give cpu or cuda") from None
    gpus = torch.cuda.device_count() if found.type == "cuda" else None
    if gpus is not None and (found.index or 0) >= gpus:
        raise ValueError(f"device {device}: PyTorch finds {gpus or 'no'} GPUs here; give cpu or another one")
    return found


# --- the number format


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where `device` has units for it that gain something, else float32: also where it would be emulated.

    Raises ValueError for a value of LATENTCODEC_DTYPE that is neither.
    """
    wanted = os.environ.get(OVERRIDE)
    if wanted:
        if wanted not in DTYPES:
            raise ValueError(f"{OVERRIDE} is {wanted!r}; it may be {' or '.join(DTYPES)}, or be left out")
        return DTYPES[wanted]
    return torch.bfloat16 if _gains_by_bfloat16(torch.device(device).type) else torch.float32


def training_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """As `fast_dtype`, but float32 on x86 processors without AMX, whose convolutions are Winograd's, both ways.

    The demo made 854 steps in float32 on AVX2 alone where the same Zen 4 made 808 in bfloat16 (2026-11-29). An Intel
    Xeon took 1.15 s a step of photo-f8c16 in float32 and 2.47 s in bfloat16 (2026-12-01).
    """
    flags = cpu_flags() or frozenset()
    has_override = bool(os.environ.get(OVERRIDE))
    if torch.device(device).type == "cpu" and AVX512 in flags and AMX not in flags and not has_override:
        return torch.float32
    return fast_dtype(device)


def is_fast(dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Whether `device` computes in `dtype` itself. GPUs do in float16; of CPUs, few do, and none counts."""
    if dtype == torch.float16:
        return torch.device(device).type != "cpu"
    return dtype != torch.bfloat16 or fast_dtype(device) == torch.bfloat16


def emulation_cost(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """How many times as long as in float32 a convolution takes in `dtype`, forward and backward, as measured now."""
    return convolution_seconds(dtype, device) / convolution_seconds(torch.float32, device)


def convolution_seconds(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Seconds of a 3x3 convolution of 64 channels on 4 maps of 48 x 48, forward and backward; the best of three."""
    x = torch.ones(4, 64, 48, 48, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    layer = torch.nn.Conv2d(64, 64, 3, padding=1, device=device, dtype=dtype).to(
        memory_format=torch.channels_last
    )
    x.requires_grad_()
    durations = []
    for _ in range(1 + TRIALS):
        start = time.perf_counter()
        with torch.enable_grad():
            layer(x).sum().backward()
        torch.accelerator.synchronize() if x.device.type != "cpu" else None
        durations.append(time.perf_counter() - start)
    return min(durations[1:])  # the first one prepares


def _gains_by_bfloat16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _has_bfloat16_units(device_type)


@cache
def _has_bfloat16_units(device_type: str) -> bool:
    if device_type == "cpu":
        if not torch.backends.mkldnn.is_available():
            return False  # torch's own convolutions know no such units
        if (flags := cpu_flags()) is not None and not flags & {"bf16"}:
            return AMX in flags or (AVX512 in flags and _vendor() == AVX512_VENDOR)
    # Other devices, processors that the system does not describe, and ARM, where units alone are not enough: torch must
    # have been built to use them.
    try:
        return REAL_GAIN * convolution_seconds(torch.bfloat16, device_type) < convolution_seconds(
            torch.float32, device_type
        )
    except (RuntimeError, TypeError):  # it cannot do it at all
        return False


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Let float32 be float32 in the convolutions of this process, on GPUs too, whose cuDNN rounds to 10 bits (TF32).

    Only that one setting is touched: `torch.backends.cudnn.flags` sets all of them, and raises where programs use the
    newer names. Matrix products are exact by torch's default.
    """
    convolutions = cast(Any, torch.backends.cudnn).conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


# --- instructions


def cpu_flags() -> frozenset[str] | None:
    """The instruction sets that the processor has and oneDNN may use; None where the system does not tell."""
    if not CPUINFO.is_file():
        return None
    for line in CPUINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # on x86, on ARM
            return frozenset(value.split()) - _switched_off()
    return None


def instruction_sets() -> list[str]:
    """Those that decide about the speed of a codec, weakest first; empty where the system does not tell."""
    flags = cpu_flags() or frozenset()
    return [name for name in ("avx2", *list(X86_LEVELS.values())[5:], *ARM_FLAGS) if name in flags]


def _vendor() -> str:
    """Of an x86 processor, by its own name for itself; empty where the system does not tell."""
    text = CPUINFO.read_text() if CPUINFO.is_file() else ""
    vendor = re.search(r"vendor_id\s*:\s*(\S+)", text)
    return vendor[1] if vendor else ""


def cpu_name() -> str:
    """The processor's own name; Linux tells it, elsewhere it is the architecture's."""
    text = CPUINFO.read_text() if CPUINFO.is_file() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    return model[1].strip() if model else platform.processor() or platform.machine()


def _switched_off() -> frozenset[str]:
    """x86 instructions beyond the limit that the environment sets for oneDNN."""
    limit = next((os.environ[name].upper() for name in ONEDNN_LIMITS if os.environ.get(name)), "DEFAULT")
    levels = list(X86_LEVELS)
    return frozenset(list(X86_LEVELS.values())[levels.index(limit) + 1 :] if limit in levels else ())


# --- cores


def physical_cores() -> int:
    """Cores that this process may use: by its affinity, two threads of one core counted once, and by the limits of its
    control groups (containers, SLURM), rounded down; at least 1."""
    logical = _allowed_threads()
    cores = {_core(thread) for thread in logical}
    count = len(cores) if None not in cores else min(len(logical), psutil.cpu_count(logical=False) or 1)
    return max(1, min([count, *(int(limit) for limit in processor_limits())]))


def use_cores(processes: int = 1, workers: int = 0, threads: int | None = None) -> int:
    """Let torch compute with this process's share of the cores; returns how many threads that are.

    `processes` share the machine, and each has `workers` that read data: one core is left to each of them, but at most
    a quarter of the process's cores to all. `threads` takes the place of the share. OMP_NUM_THREADS, which
    `accelerate launch` and torchrun set to 1, does not count.
    """
    if threads is None:
        share = max(1, physical_cores() // processes)
        threads = share - min(workers, share // 4)
    torch.set_num_threads(threads)
    return threads


def _allowed_threads() -> list[int]:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _core(thread: int) -> tuple[str, str] | None:
    """Package and number of the core behind a logical processor; None where the system does not tell."""
    folder = Path(TOPOLOGY.format(thread))
    try:
        return (folder / "physical_package_id").read_text(), (folder / "core_id").read_text()
    except OSError:
        return None
