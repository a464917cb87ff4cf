"""How close a reconstruction is to its image: PSNR, SSIM, LPIPS, and the one evaluator of training and bench.

The protocol of `evaluate` is fixed, because numbers from different protocols cannot be compared: posterior
mode, whole images, clamp, round to 8 bits, every metric on those same 8-bit images, one image at a time, then
the mean over the images. Nothing here knows a model: a codec is anything with `encode` and `decode`.

Shapes: B batch, C channels, H W pixels, h w latent cells, c latent channels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from latentcodec.finite import NotFinite, require_finite
from latentcodec.pixels import from_uint8, to_uint8
from latentcodec.quality.perceptual import Perceptual

Metric = Callable[[Tensor, Tensor], Tensor]
"""Two batches [B, C, H, W] in [-1, 1] -> [B]."""

DATA_RANGE = 2.0  # of pixels in [-1, 1]
SSIM_WINDOW = 11  # taps of the gaussian, pixels
SSIM_SIGMA = 1.5  # pixels


class Codec(Protocol):
    """What `evaluate` needs: `LatentCodec` has it, `KLT` has it."""

    def encode(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1] -> [B, c, h, w], without randomness."""

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """[B, c, h, w] -> [B, C, *size]."""


@dataclass(frozen=True)
class Score:
    """The metrics of one image."""

    psnr: float
    """dB; inf where the 8-bit image came back unchanged."""
    ssim: float
    """At most 1, which equal images have."""
    lpips: float
    """0 for equal images; nan where LPIPS was not asked for."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of a codec on some images."""

    images: list[Score]
    """In the order of the images."""

    def values(self, name: Literal["psnr", "ssim", "lpips"]) -> list[float]:
        """One metric, image by image."""
        return [getattr(score, name) for score in self.images]

    def mean(self, name: Literal["psnr", "ssim", "lpips"]) -> float:
        """The mean over the images; for PSNR the mean of the decibels, not the PSNR of a mean error."""
        return sum(self.values(name)) / len(self.images)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """[B, C, H, W] twice -> [B], peak signal to noise ratio in dB over all channels; inf for equal images.

    10 log10(2^2 / mse) for pixels in [-1, 1].
    """
    mse = (x.float() - y.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(DATA_RANGE**2 / mse)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """[B, C, H, W] twice -> [B], structural similarity, the mean over pixels and channels.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004: a gaussian
    window of 11 taps and sigma 1.5, K1 = 0.01, K2 = 0.03, each colour channel by itself. The formula is for pixels
    from 0 up, so those in [-1, 1] are moved to [0, 1] first. Only windows inside the image count, as there and in
    scikit-image; torchmetrics adds windows over the mirrored border. In float64, since the variance of a flat window is
    the small difference of two means: in float32 a white field lost 0.0004.
    Raises `ValueError` for images smaller than the window.
    """
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, got {list(x.shape[-2:])}"
        )
    channels = zip(x.unbind(1), y.unbind(1), strict=True)  # one at a time, in a third of the memory
    return torch.stack([_channel_ssim(a, b) for a, b in channels]).mean(0).float()


def _channel_ssim(x: Tensor, y: Tensor) -> Tensor:
    """[B, H, W] in [-1, 1] twice -> [B] float64."""
    x, y = (x.double() + 1) / 2, (y.double() + 1) / 2
    mean_x, mean_y, square_x, square_y, product = _local_mean(torch.stack([x, y, x * x, y * y, x * y]))
    variance_x = (square_x - mean_x**2).clamp(min=0)  # rounding may go below
    variance_y = (square_y - mean_y**2).clamp(min=0)
    covariance = product - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def lpips_metric(net: str = "vgg", weights: str | Path | None = None) -> Metric:
    """LPIPS as a metric of two batches: [B, C, H, W] in [-1, 1] twice -> [B].

    0 for equal images, about 1 for unrelated ones; other than 3 channels are compared one by one, as grey. Each side
    needs `perceptual.SMALLEST_SIDE[net]` pixels. net: "vgg", "alex" or "squeeze"; weights: a safetensors file, or None
    for torchvision's ImageNet features. Raises `ValueError` where the weights are not to be had.
    """
    return Perceptual(net, weights)


@torch.inference_mode()
def reconstruct(codec: Codec, x: Tensor) -> Tensor:
    """What a viewer gets of [B, C, H, W] in [-1, 1]: encoded, decoded, clamped and rounded to 8 bits."""
    height, width = x.shape[-2:]
    y = codec.decode(codec.encode(x), size=(height, width))
    require_finite({"the reconstruction": y}, f"an image of {height} x {width} pixels has no score")
    return _on_the_8_bit_grid(y.to(x))


@torch.inference_mode()
def evaluate(
    codec: Codec, images: Iterable[Tensor], lpips: Metric | None = None, names: Sequence[str] = ()
) -> Evaluation:
    """Score `codec` on `images`, each [C, H, W] in [-1, 1] and of any size, by the protocol of this file.

    The metrics are computed where the images are; LPIPS, from `lpips_metric`, only where it is given.
    Raises `ValueError` where there is no image, or one of less than 11 pixels a side, which SSIM needs; and
    `NotFinite`, with the image's entry in `names` or its number, where a reconstruction or a score is NaN or infinite,
    other than the PSNR of an image that came back unchanged.
    """
    scores = []
    for number, image in enumerate(images):
        name = names[number] if number < len(names) else f"image {number + 1}"
        try:
            scores.append(_score(codec, image, lpips))
        except NotFinite as error:
            raise NotFinite(f"{name}: {error}") from error
    if not scores:
        raise ValueError("there is no image to evaluate the codec on")
    return Evaluation(scores)


def _score(codec: Codec, image: Tensor, lpips: Metric | None) -> Score:
    """The metrics of one image [C, H, W]."""
    require_finite({"its pixels": image}, "no score")
    x, y = _on_the_8_bit_grid(image[None]), reconstruct(codec, image[None])  # [1, C, H, W]
    similarity, distance = ssim(x, y), None if lpips is None else lpips(x, y)
    require_finite({"SSIM": similarity} | ({} if distance is None else {"LPIPS": distance}), "no score")
    return Score(psnr(x, y).item(), similarity.item(), float("nan") if distance is None else distance.item())


def _on_the_8_bit_grid(x: Tensor) -> Tensor:
    return from_uint8(to_uint8(x))  # to_uint8 clamps


def _local_mean(x: Tensor) -> Tensor:
    """[..., H, W] -> [..., H - 10, W - 10]: the gaussian mean around every pixel whose window is inside."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    taps = torch.softmax(-(offsets**2) / (2 * SSIM_SIGMA**2), dim=0).tolist()  # [11]; a gaussian of sum 1
    for dim in (-2, -1):  # slices added up take a third of the time of a convolution with one channel
        length = x.shape[dim] - SSIM_WINDOW + 1
        mean = x.narrow(dim, 0, length) * taps[0]
        for start, tap in enumerate(taps[1:], 1):
            mean.add_(x.narrow(dim, start, length), alpha=tap)
        x = mean
    return x
