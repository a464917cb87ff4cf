"""The work between two convolutions: statistics, normalisation, attention, each one pass over a strip.

It is written once in plain torch, as `REFERENCE_KERNELS`, which every other form is tested against: `native/` has those
for CPUs, `triton_pointwise.py` those for GPUs.

What matters is bytes: a decoder of Stable Diffusion's size normalises 460 million values for 512 x 512 pixels, and
eager torch passes over them four times where one function here passes once.

Shapes: B batch, r rows and n pixels of a strip, W columns, C channels; strips are [B, r, W, C], channels last, of s
bytes a value.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

Activation = Callable[[Tensor], Tensor]


WORTH_COMPILING = 1 << 17  # values, below which the call of a compiled function costs what it saves


class Norm(NamedTuple):
    """A group norm whose statistics are known, and the activation after it."""

    scale: Tensor
    """[B, 1, C] float32."""
    shift: Tensor
    """[B, 1, C] float32."""
    activation: Activation | None


class RMS(NamedTuple):
    """A norm by the root mean square over the channels of each pixel, and the activation after it."""

    gain: Tensor
    """[C]: what a pixel of length 1 is multiplied by."""
    activation: Activation | None


def rms_normalise_(out: Tensor, x: Tensor, gain: Tensor, activation: Activation | None) -> None:
    """out <- activation(gain x / |x|) in float32, rounded once; out, x [B, n, C], gain [C], |x| over the channels."""
    y = x.float()
    length = y.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)  # as torch's `normalize`
    y = y / length * gain.float()
    out.copy_(y if activation is None else activation(y))


def normalise_(out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, activation: Activation | None) -> None:
    """out <- activation(scale x + shift) in float32, rounded once; 2 n C s bytes.

    out, x [B, n, C]; scale, shift [B, 1, C] float32: a group norm whose statistics are known.
    """
    y = x.float() * scale + shift
    out.copy_(y if activation is None else activation(y))


def sums(x: Tensor, pivot: Tensor) -> Tensor:
    """[B, r, W, C] -> [2, B, r, C] float32: each row's sums of x - pivot and of its square; n C s bytes.

    pivot [B, 1, 1, C] float32 lies near the mean, so that variances do not come out as differences of large numbers.
    """
    distance = x.float() - pivot
    return torch.stack([distance.sum(2), distance.square().sum(2)])


def gradient_sums(dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor) -> Tensor:
    """[B, H, W, C] -> [2, B, H, C] float32: each row's sums of g and g (x - mean), g = dy SiLU'(scale x + shift).

    scale, shift, mean [B, 1, 1, C] float32; 2 n C s bytes.
    """
    x = x.float()
    g = dy.float() * silu_slope(scale * x + shift)
    return torch.stack([g.sum(2), (g * (x - mean)).sum(2)])


def gradient(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """scale g + a + b (x - mean), with the g of `gradient_sums`, rounded once to x's dtype; 3 n C s bytes.

    dy, x [B, H, W, C]; the others [B, 1, 1, C] float32.
    """
    y = x.float()
    g = dy.float() * silu_slope(scale * y + shift)
    return (scale * g + a + b * (y - mean)).to(x.dtype)


def silu_slope(u: Tensor) -> Tensor:
    """The derivative of SiLU."""
    sigmoid = u.sigmoid()
    return sigmoid * (1 + u * (1 - sigmoid))


class Moments:
    """Mean and variance of every channel of a map, gathered strip by strip.

    What is added up, in float64, is the distance from a pivot and its square. So the sums of strips are the sums of
    the map, the variance between strips included, and a pivot near the mean keeps the float32 sums within a row from
    cancelling.
    """

    fuses_bias_and_residual = False
    """Whether a convolution may leave its bias and a residual to `add`."""

    def __init__(self) -> None:
        self.pixels = 0
        self.known = False

    def add(self, strip: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
        """Count a strip in, unless the moments are known: then it is one that is made again."""
        if self.known:
            return
        if not self.pixels:
            first = strip[:, :1]
            self.pivot = first.mean(2, keepdim=True, dtype=torch.float32)  # [B, 1, 1, C]
            self.sums = torch.zeros(2, len(strip), strip.shape[-1], dtype=torch.float64, device=strip.device)
        self.sums += sums(strip, self.pivot).sum(2, dtype=torch.float64)
        self.pixels += strip.shape[1] * strip.shape[2]

    def norm(
        self, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: Activation | None
    ) -> Norm:
        """The group norm of this map, of which no new strip will come; weight and bias [C]."""
        self.known = True
        distance, square = self.sums / self.pixels  # [B, C]
        means, variance = self.pivot[:, 0, 0] + distance, square - distance.square()
        means, variance = (value.view(len(value), groups, -1) for value in (means, variance))
        self.mean = means.mean(2, keepdim=True)  # [B, groups, 1]
        self.inverse = (variance + (means - self.mean).square()).mean(2, keepdim=True).add_(eps).rsqrt_()
        scale = weight * self.inverse.expand_as(means).flatten(1)
        shift = bias - self.mean.expand_as(means).flatten(1) * scale
        return Norm(scale.float()[:, None], shift.float()[:, None], activation)


class Kernels:
    """The work between two convolutions, on any device, out of the functions above."""

    def moments(self, inner: bool = False) -> Moments:
        """Of a map to come; of an `inner` one nothing is read but its norm."""
        return Moments()

    def normalise_(self, out: Tensor, x: Tensor, norm: Norm | RMS) -> None:
        """out <- x, normalised; [B, n, C]."""
        if isinstance(norm, RMS):
            rms_normalise_(out, x, *norm)
        else:
            normalise_(out, x, *norm)

    def window_(
        self,
        out: Tensor,
        above: Tensor | None,
        strip: Tensor,
        below: Tensor | None,
        norm: Norm | RMS | None,
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

    def halving_window_(self, out: Tensor, strip: Tensor, below: Tensor | None) -> None:
        """out [B, r + 1, W + 1, C] <- strip [B, r, W, C], the first row of below, and zeros right of them."""
        rows, columns = strip.shape[1:3]
        out[:, :rows, :columns] = strip
        out[:, rows:, :columns] = 0 if below is None else below[:, :1]
        out[:, :, columns:] = 0

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor, norm: Norm, mean: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, weight and bias, given that of SiLU(n weight + bias), n = (x - mean) inverse.

        dy, x [B, H, W, C]; weight [C]; mean, inverse [B, groups, 1]. With g the gradient before SiLU and <.> the mean
        over a group: dbias = sum g, dweight = sum g n, dx = inverse (weight g - <weight g> - n <weight g n>).
        """
        members = x.shape[3] // inverse.shape[1]
        known = norm.scale[:, None], norm.shift[:, None], _spread(mean, members)  # [B, 1, 1, C]
        sums = self.gradient_sums(dy, x, *known).sum(2, dtype=torch.float64)
        groups = sums.view(2, len(x), -1, members)  # [2, B, groups, members]
        values = x[0, :, :, 0].numel() * members
        of_groups = (groups * weight.view(-1, members)).sum(3, keepdim=True) / values
        a, b = -inverse * of_groups[0], -(inverse**3) * of_groups[1]
        dx = self.gradient(dy, x, *known, _spread(a, members), _spread(b, members))
        dbias, dweight = groups[0].sum(0), (groups[1] * inverse).sum(0)
        return dx, dweight.flatten().to(weight.dtype), dbias.flatten().to(weight.dtype)

    def gradient_sums(self, dy: Tensor, x: Tensor, *known: Tensor) -> Tensor:
        """`gradient_sums` of maps [B, H, W, C], or what adds up to it over the third axis."""
        return gradient_sums(dy, x, *known)

    def gradient(self, dy: Tensor, x: Tensor, *known: Tensor) -> Tensor:
        """`gradient` of maps [B, H, W, C]."""
        return gradient(dy, x, *known)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, score_bytes: int) -> Tensor:
        """softmax(q k^T / sqrt(C)) v; all [B, n, C]. `score_bytes` bounds the scores of kernels that keep them in
        float32; torch's own keep none."""
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


def _spread(groups: Tensor, members: int) -> Tensor:
    """[B, groups, 1] -> [B, 1, 1, C] float32: the same for all members of a group."""
    return groups.float().expand(-1, -1, members).reshape(len(groups), 1, 1, -1)


REFERENCE_KERNELS = Kernels()


def compiled_function(function: Callable[..., Any]) -> Callable[..., Any]:
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
