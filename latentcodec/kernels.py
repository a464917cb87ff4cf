"""The pointwise work between two convolutions: each function is one pass over a strip.

They are written once in torch, as they stand in `EAGER`; `compiled` gives them as inductor makes them, C++ on CPUs and
Triton on GPUs. What matters is bytes: a decoder of Stable Diffusion's size normalises 460 million values for 512 x 512
pixels, and eager torch passes over them four times where one function here passes once.

Shapes: B batch, n pixels of a strip, C channels; strips are [B, n, C], channels last, of s bytes a value.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Activation = Callable[[Tensor], Tensor]

WORTH_COMPILING = 1 << 17  # values, below which the call of a compiled function costs what it saves


def normalise_(out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, activation: Activation) -> None:
    """out <- activation(scale x + shift) in float32, rounded once; 2 n C s bytes.

    out, x [B, n, C]; scale, shift [B, 1, C] float32: a group norm whose statistics are known.
    """
    out.copy_(activation(x.float() * scale + shift))


def sums(x: Tensor, pivot: Tensor) -> Tensor:
    """[B, n, C] -> [2, B, C] float32: the sums of x - pivot and of its square; n C s bytes.

    pivot [B, 1, C] float32 lies near the mean, so that variances do not come out as differences of large numbers.
    """
    distance = x.float() - pivot
    return torch.stack([distance.sum(1), distance.square().sum(1)])


class Kernels(NamedTuple):
    """The functions above in one of their two forms."""

    normalise_: Callable[[Tensor, Tensor, Tensor, Tensor, Activation], None]
    sums: Callable[[Tensor, Tensor], Tensor]


EAGER = Kernels(normalise_, sums)


@cache
def compiled(device_type: str) -> Kernels:
    """The functions as inductor compiles them at their first use; `EAGER`, saying so once, without a compiler."""
    if not _has_compiler(device_type):
        log.warning(
            "no compiler for %s was found: the fused functions run uncompiled, slower but equal", device_type
        )
        return EAGER
    return Kernels(*(_compiled(function) for function in EAGER))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for what is large enough, with a line in the log for the time that compiling took.

    A compiler that is there but fails, as for want of Python's headers, leaves the function as it is.
    """
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    fast = torch.compile(function, dynamic=True)

    @wraps(function)
    def call(x: Tensor, *others: Any) -> Any:
        nonlocal fast
        if x.numel() < WORTH_COMPILING or fast is function:
            return function(x, *others)
        started = time.perf_counter()
        try:
            result = fast(x, *others)
        except (InductorError, BackendCompilerFailed) as error:
            reason = str(error).strip().splitlines()[0]
            log.warning("%s runs uncompiled, slower but equal: %s", function.__name__, reason)
            fast = function
            return function(x, *others)
        if (seconds := time.perf_counter() - started) > 1:
            log.warning(
                "compiled %s for %s in %.0f s; later processes find it in inductor's cache",
                function.__name__,
                x.dtype,
                seconds,
            )
        return result

    return call


def _has_compiler(device_type: str) -> bool:
    if device_type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
