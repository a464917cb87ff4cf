"""What a decoder makes of latents that were disturbed: channels removed, noise, 8 bits, turned and halved images.

Shapes: N images, C channels, H W pixels, c latent channels, h w latent cells, f downsampling factor.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcodec.pixels import from_uint8, to_uint8
from latentcodec.quality.metrics import psnr

NOISES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # deviations, in units of the latents' own
BATCH_PIXELS = 2**19  # decoded in one call: eight windows of 256 pixels
SMALLEST_VARIANCE = 1e-12  # of images in [-1, 1]; one level in one pixel of a megapixel is more
PERFECT = 100.0  # dB; an image that comes back unchanged would have infinitely many, which no mean could hold
BLOCK = 16  # cells a side that share their 256 levels in `int8_in_blocks`


class Inspectable(Protocol):
    """What the measures need of a codec; `LatentCodec` has it."""

    @property
    def downsampling_factor(self) -> int:
        """f."""

    @property
    def latent_channels(self) -> int:
        """c."""

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] in [-1, 1] -> mean and standard deviation, each [B, c, h, w], normalised."""

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """[B, c, h, w] -> [B, C, *size]."""


Progress = Callable[[int], None]
"""Is told of each number of images that has been encoded or decoded."""


def no_progress(images: int) -> None:
    """Progress that nobody sees."""


def batches(count: int, pixels: int) -> list[slice]:
    """Slices of `count` images of so many pixels each that fit into one call."""
    size = max(1, BATCH_PIXELS // pixels)
    return [slice(start, start + size) for start in range(0, count, size)]


@torch.inference_mode()
def posteriors(codec: Inspectable, x: Tensor, progress: Progress = no_progress) -> tuple[Tensor, Tensor]:
    """x [N, C, H, W] -> mean and deviation of the posterior, [N, c, h, w] float32 on the CPU, batch by batch."""
    means, stds = [], []
    for part in batches(len(x), x[0, 0].numel()):
        mean, std = codec.posterior(x[part])
        means.append(mean.float().cpu())
        stds.append(std.float().cpu())
        progress(len(mean))
    return torch.cat(means), torch.cat(stds)


@torch.inference_mode()
def decoded(codec: Inspectable, z: Tensor, size: tuple[int, int], progress: Progress = no_progress) -> Tensor:
    """z [N, c, h, w] -> [N, C, *size] as a viewer gets it: clamped to [-1, 1] and rounded to 8 bits, on the CPU."""
    images = []
    for part in batches(len(z), size[0] * size[1]):
        images.append(from_uint8(to_uint8(codec.decode(z[part], size=size))).cpu())
        progress(len(images[-1]))
    return torch.cat(images)


def decibels(x: Tensor, y: Tensor) -> Tensor:
    """[N]: PSNR of 8-bit images, at most 100 dB."""
    return psnr(from_uint8(to_uint8(x)), y).clamp(max=PERFECT)


def decoder_spread(x: Tensor, y: Tensor) -> float | None:
    """Variance over the images of the decoded means y [N, C, H, W] over that of the images x; collapsed: about 0.

    None where the images do not differ, as a single one does not: nothing can be said of their decoded means then.
    """
    variance = x.var(0, unbiased=False).mean()
    return (y.var(0, unbiased=False).mean() / variance).item() if variance > SMALLEST_VARIANCE else None


def channel_drops(
    codec: Inspectable, x: Tensor, z: Tensor, mean: Tensor, progress: Progress = no_progress
) -> list[float]:
    """dB of PSNR lost where channel k of z [N, c, h, w] is replaced by its `mean` [c]: what the decoder makes of it."""
    size = (x.shape[-2], x.shape[-1])
    whole = decibels(x, decoded(codec, z, size, progress)).mean().item()
    drops = []
    for channel in range(z.shape[1]):
        without = z.clone()
        without[:, channel] = mean[channel].to(z)
        drops.append(whole - decibels(x, decoded(codec, without, size, progress)).mean().item())
    return drops


def noise_curve(
    codec: Inspectable, x: Tensor, z: Tensor, std: Tensor, whole: float, progress: Progress = no_progress
) -> list[tuple[float, float]]:
    """(a, mean PSNR of D(z + a s eps)) for a of `NOISES`, s the channels' own deviation `std` [c]; first (0, whole)."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z) * std[:, None, None].to(z)
    size = (x.shape[-2], x.shape[-1])
    curve = [(0.0, whole)]
    for a in NOISES:
        curve.append((a, decibels(x, decoded(codec, z + a * noise, size, progress)).mean().item()))
    return curve


def noise_of_one_decibel(curve: Sequence[tuple[float, float]]) -> float:
    """The noise a at which a `noise_curve` has lost 1 dB; 0.01 where even the least noise costs more, 1 at most.

    Interpolated in log a. The loss starts as a^2, which places it below the first point.
    """
    (_, whole), *points = curve
    losses = [(a, max(0.0, whole - value)) for a, value in points]
    first, loss = losses[0]
    if loss >= 1:
        return max(0.01, first / math.sqrt(loss))
    for (a, low), (b, high) in itertools.pairwise(losses):
        if high >= 1:
            place = (1 - low) / (high - low)
            return math.exp(math.log(a) + place * (math.log(b) - math.log(a)))
    return 1.0


def int8(z: Tensor) -> Tensor:
    """z [N, c, h, w] rounded to 256 levels, from the smallest to the largest value of each channel of an image."""
    low, high = z.amin((2, 3), keepdim=True), z.amax((2, 3), keepdim=True)
    step = ((high - low) / 255).clamp(min=torch.finfo(z.dtype).tiny)
    return low + ((z - low) / step).round() * step


def int8_in_blocks(z: Tensor) -> Tensor:
    """The same for each block of 16 x 16 cells: two float16 numbers a block, 1.6 % more than the 8 bits themselves."""
    rows = [torch.cat([int8(block) for block in row.split(BLOCK, 3)], 3) for row in z.split(BLOCK, 2)]
    return torch.cat(rows, 2)


def equivariance_errors(codec: Inspectable, x: Tensor, progress: Progress = no_progress) -> dict[str, float]:
    """|T E(x) - E(T x)|^2 / |E(T x)|^2 for T = halving, a quarter turn and mirroring, the sums over all of x.

    Two published kinds of it disagree, and it says little of generation: it is shown, and nothing is judged by it.
    """
    f = codec.downsampling_factor
    sides = [side // (2 * f) * 2 * f for side in x.shape[-2:]]
    if min(sides) < 2 * f:
        return {}
    x = x[..., : min(sides), : min(sides)]
    z = posteriors(codec, x, progress)[0]
    errors = {}
    for name, change in (("half", _half), ("quarter_turn", _turn), ("mirror", _mirror)):
        expected = posteriors(codec, change(x), progress)[0]
        difference = (change(z) - expected).square().sum()
        errors[name] = (difference / expected.square().sum().clamp(min=1e-12)).item()
    return errors


def _half(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=0.5, mode="bilinear")


def _turn(x: Tensor) -> Tensor:
    return x.rot90(dims=(2, 3))


def _mirror(x: Tensor) -> Tensor:
    return x.flip(3)
