"""What a mean PSNR does not say: how sure it is, whether colours shift, and what ten round trips do.

Shapes: B batch, C channels, H W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentcodec.pixels import from_uint8, to_uint8
from latentcodec.quality.metrics import Codec, psnr, reconstruct

RESAMPLES = 2000  # of the bootstrap
LEVELS = 127.5  # 8-bit levels of a pixel step of 1


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of the means of resamples of `values`: percentile bootstrap, the same in every call.

    In about 95 of 100 cases it holds the mean over all such images. (nan, nan) for one value, or where one is not
    finite.
    """
    data = torch.tensor(values, dtype=torch.float64)
    if len(data) < 2 or not data.isfinite().all():
        return float("nan"), float("nan")
    picks = torch.randint(len(data), (RESAMPLES, len(data)), generator=torch.Generator().manual_seed(0))
    low, high = data[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


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
