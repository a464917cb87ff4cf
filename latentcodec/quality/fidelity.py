"""What a mean PSNR does not say: how sure it is, whether colours shift, and what ten round trips do.

Shapes: B batch, C channels, H W pixels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latentcodec.pixels import from_uint8, to_uint8
from latentcodec.quality.metrics import Codec, psnr, reconstruct

RESAMPLES = 2000  # of the bootstrap
NORMAL = 1.959964  # deviations: the middle 95 % of a normal distribution
FEW = (12.7062, 4.3027, 3.1824, 2.7764)  # the same of Student's t with 1 to 4 degrees of freedom
LEVELS = 127.5  # 8-bit levels of a pixel step of 1


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of the means of resamples of `values`, widened for few of them; the same in every call.

    In about 95 of 100 cases it holds the mean over all such images. (nan, nan) for one value, or where one is not
    finite. A bootstrap knows no values but those it has, so of two its interval would hold the mean in 50 of 100 cases
    only: it is stretched about the mean as Student's t is wider than the normal distribution (Hesterberg 2015, "What
    teachers should know about the bootstrap", section 4.1).
    """
    data = torch.tensor(values, dtype=torch.float64)
    if len(data) < 2 or not data.isfinite().all():
        return float("nan"), float("nan")
    picks = torch.randint(len(data), (RESAMPLES, len(data)), generator=torch.Generator().manual_seed(0))
    quantiles = data[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    stretch = student(len(data) - 1) / NORMAL * math.sqrt(len(data) / (len(data) - 1))
    low, high = (data.mean() + stretch * (quantiles - data.mean())).tolist()
    return low, high


def student(freedom: int) -> float:
    """The middle 95 % of Student's t with so many degrees of freedom lie within so many deviations; to 0.003."""
    if freedom <= len(FEW):
        return FEW[freedom - 1]
    z, n = NORMAL, freedom  # Abramowitz and Stegun 1964, 26.7.5
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / n + second / n**2 + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)


def colour_shift(x: Tensor, y: Tensor) -> list[float]:
    """Mean of y - x for each channel of [B, C, H, W] in [-1, 1], in levels of 8 bits; 0 is no shift."""
    return [LEVELS * value for value in (y - x).mean((0, 2, 3)).tolist()]


@torch.inference_mode()
def round_trips(codec: Codec, x: Tensor, times: int = 10) -> list[float]:
    """PSNR in dB of [1, C, H, W] against itself after 1, 2, ... `times` round trips, each through 8 bits."""
    start, y, scores = from_uint8(to_uint8(x)), x, []
    for _ in range(times):
        y = reconstruct(codec, y)
        scores.append(psnr(start, y).item())
    return scores
