"""The work between two convolutions: statistics, normalisation, attention, each one pass over a strip.

It is written once in torch, as it stands in `EAGER`; `compiled` gives what passes over maps as inductor makes it for
CPUs, and as `triton_kernels.py` has it for GPUs.

What matters is bytes: a decoder of Stable Diffusion's size normalises 460 million values for 512 x 512 pixels, and
eager torch passes over them four times where one function here passes once.

Shapes: B batch, r rows and n pixels of a strip, W columns, C channels; strips are [B, r, W, C], channels last, of s
bytes a value.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)

Activation = Callable[[Tensor], Tensor]

QUERY_BYTES = 64 << 20  # of attention weights at a time, in float32
WORTH_COMPILING = 1 << 17  # values, below which the call of a compiled function costs what it saves


class Norm(NamedTuple):
    """A group norm whose statistics are known, and the activation after it."""

    scale: Tensor
    """[B, 1, C] float32."""
    shift: Tensor
    """[B, 1, C] float32."""
    activation: Activation | None


def normalise_(out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, activation: Activation | None) -> None:
    """out <- activation(scale x + shift) in float32, rounded once; 2 n C s bytes.

    out, x [B, n, C]; scale, shift [B, 1, C] float32: a group norm whose statistics are known.
    """
    y = x.float() * scale + shift
    out.copy_(y if activation is None else activation(y))


def sums(x: Tensor, pivot: Tensor) -> Tensor:
    """[B, n, C] -> [2, B, C] float32: the sums of x - pivot and of its square; n C s bytes.

    pivot [B, 1, C] float32 lies near the mean, so that variances do not come out as differences of large numbers.
    """
    distance = x.float() - pivot
    return torch.stack([distance.sum(1), distance.square().sum(1)])


class Moments:
    """Mean and variance of every channel of a map, gathered strip by strip.

    What is added up, in float64, is the distance from a pivot and its square. So the sums of strips are the sums of
    the map, the variance between strips included, and a pivot near the mean keeps the float32 sums within a strip
    from cancelling.
    """

    adds_what_is_left_out = False
    """Whether a convolution may leave its bias and a residual to `add`."""

    def __init__(self, sums: Callable[[Tensor, Tensor], Tensor] = sums) -> None:
        self.sums_of = sums
        self.pixels = 0
        self.known = False

    def add(self, strip: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        """Count a strip in, unless the moments are known: then it is one that is made again."""
        if self.known:
            return
        if not self.pixels:
            self.pivot = strip[:, 0].mean(1, keepdim=True, dtype=torch.float32)  # [B, 1, C], of the first row
            self.sums = torch.zeros(2, len(strip), strip.shape[-1], dtype=torch.float64, device=strip.device)
        self.sums += self.sums_of(strip.flatten(1, 2), self.pivot)
        self.pixels += strip.shape[1] * strip.shape[2]

    def norm(self, layer: nn.GroupNorm, activation: Activation | None) -> Norm:
        """`layer` on this map, of which no new strip will come."""
        self.known = True
        distance, square = self.sums / self.pixels  # [B, C]
        mean, variance = self.pivot[:, 0] + distance, square - distance.square()
        groups = len(mean), layer.num_groups, -1
        centre = mean.view(groups).mean(2, keepdim=True)  # [B, groups, 1]
        spread = (variance.view(groups) + (mean.view(groups) - centre).square()).mean(2, keepdim=True)
        scale = layer.weight * (spread + layer.eps).rsqrt().expand_as(mean.view(groups)).flatten(1)
        shift = layer.bias - centre.expand_as(mean.view(groups)).flatten(1) * scale
        return Norm(scale.float()[:, None], shift.float()[:, None], activation)


class Kernels:
    """The work between two convolutions, on any device, out of the two functions above."""

    def __init__(self, normalise_: Callable[..., None], sums: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._normalise_, self._sums = normalise_, sums

    def moments(self, inner: bool = False) -> Moments:
        """Of a map to come; of an `inner` one nothing is read but its norm."""
        return Moments(self._sums)

    def normalise_(self, out: Tensor, x: Tensor, norm: Norm) -> None:
        """out <- x, normalised; [B, n, C]."""
        self._normalise_(out, x, *norm)

    def window_(
        self, out: Tensor, above: Tensor | None, strip: Tensor, below: Tensor | None, norm: Norm | None
    ) -> None:
        """out [B, r + 2, W, C] <- the last row of above, strip [B, r, W, C] and the first of below, all normalised.

        Without a neighbour the row is zero, as the border of an image is.
        """
        around = (
            (out[:, :1], None if above is None else above[:, -1:]),
            (out[:, 1:-1], strip),
            (out[:, -1:], None if below is None else below[:, :1]),
        )
        for place, part in around:
            if part is None:
                place.zero_()
            elif norm is None:
                place.copy_(part)
            else:
                self.normalise_(place.flatten(1, 2), part.flatten(1, 2), norm)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(C)) v; all [B, n, C]. A part of the queries at a time, but for GPUs, whose kernels keep
        no scores."""
        queries = q.shape[1] if q.is_cuda else max(1, QUERY_BYTES // (4 * len(q) * q.shape[1]))
        parts = (
            F.scaled_dot_product_attention(part[:, None], k[:, None], v[:, None])
            for part in q.split(queries, 1)
        )
        return torch.cat([part[:, 0] for part in parts], 1)


EAGER = Kernels(normalise_, sums)


@cache
def compiled(device_type: str) -> Kernels:
    """As inductor compiles them at their first use; `EAGER`, saying so once, without a compiler."""
    if not has_compiler(device_type):
        log.warning(
            "no compiler for %s was found: the fused functions run uncompiled, slower but equal", device_type
        )
        return EAGER
    return Kernels(_compiled(normalise_), _compiled(sums))


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


def has_compiler(device_type: str) -> bool:
    """Whether inductor, and Triton on GPUs, can compile for such a device here."""
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
