"""Compile every kernel of `triton_kernels.py` for NVIDIA's Hopper GPUs, without having one; print its name.

Run by tests/test_triton_kernels.py in a process of its own.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from latentcodec.ops import triton_kernels as kernels
from latentcodec.ops.triton_pointwise import LARGEST, NAMES, SCORES

HOPPER = GPUTarget("cuda", 90, 32)
MAP, FLOAT = "*bf16", "*fp32"
NORM = {"SCALE": FLOAT, "SHIFT": FLOAT}
GRADIENT = {"DY": MAP, "X": MAP, **NORM, "MEAN": FLOAT}


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> None:
    """Arguments without a type are 32-bit integers."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    triton.compile(ASTSource(kernel, signature, constexprs=values), target=HOPPER)
    print(kernel.__name__)


def compile_all(channels: int, groups: int) -> None:
    width, members = triton.next_power_of_2(channels), channels // groups
    merged = {"C": channels, "MEMBERS": members, "WIDTH": triton.next_power_of_2(members), "TILE": 64}
    shape = {"C": channels, "WIDTH": width, "TILE": 8}
    for has in (False, True):
        compile_kernel(
            kernels.finish,
            {"X": MAP, "BIAS": MAP, "RESIDUAL": MAP, "PARTS": FLOAT},
            {"HAS_BIAS": has, "HAS_RESIDUAL": has, **shape},
        )
        compile_kernel(
            kernels.merge,
            {
                "PARTS": FLOAT,
                "WAITING": MAP,
                "WEIGHT": MAP,
                "BIAS": MAP,
                **NORM,
                "MEAN": FLOAT,
                "INVERSE": FLOAT,
                "eps": "fp32",
            },
            {"WAITS": has, **merged},
        )
        compile_kernel(
            kernels.halving_window, {"OUT": MAP, "STRIP": MAP, "BELOW": MAP}, {"HAS_BELOW": has, **shape}
        )
    for activation in NAMES.values():
        compile_kernel(
            kernels.window,
            {"OUT": MAP, "ABOVE": MAP, "STRIP": MAP, "BELOW": MAP, **NORM},
            {
                "BORDER": 1,
                "HAS_ABOVE": True,
                "HAS_BELOW": False,
                "HAS_NORM": True,
                "ACTIVATION": activation,
                **shape,
            },
        )
    shape["MEMBERS"] = members
    compile_kernel(kernels.gradient_sums, {**GRADIENT, "PARTS": FLOAT}, shape)
    compile_kernel(kernels.gradient, {**GRADIENT, "FACTORS": FLOAT, "DX": MAP}, shape)
    sums = {"PARTS": FLOAT, "WEIGHT": FLOAT, "INVERSE": FLOAT, "FACTORS": FLOAT, "SUMS": FLOAT}
    compile_kernel(kernels.merge_gradients, sums, merged)


if __name__ == "__main__":
    for channels, groups in ((128, 32), (96, 8)):
        compile_all(channels, groups)
    for dtype, largest in LARGEST.items():
        weights = {"torch.float32": "*fp32", "torch.bfloat16": "*bf16", "torch.float16": "*fp16"}[str(dtype)]
        compile_kernel(
            kernels.weigh,
            {"SCORES": FLOAT, "WEIGHTS": weights, "INVERSE": FLOAT, "factor": "fp32"},
            {"LIMIT": largest, "TILE": SCORES},
        )
