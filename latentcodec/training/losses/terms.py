"""What training minimises: likelihoods, the KL divergence, and how the terms add up.

Likelihood and KL are sums over an image's dimensions, in nats, [B]; every other loss is a mean per image.
With D = C H W the objective is (nll + kl_weight kl) / D + the weighted sum of the other losses, so that one
clipping threshold fits every resolution. Computed in float32: call these functions outside autocast.
How the weight of the KL is chosen is in `rate.py`; regularizers, the discriminator and LPIPS have their own files.

Shapes: B batch, C image channels, H W pixels, c latent channels, h w latent cells. Pixels are in [-1, 1].
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from latentcodec.quality.perceptual import LpipsNet

Likelihood = Literal["gaussian", "student_t", "laplace", "bernoulli"]

PIXEL_STEP = 1 / 127.5  # the distance of two 8-bit levels in [-1, 1]
HIGH_PASS_SIGMA = 1.0  # pixels
FLAT_SIDE = 16  # pixels: two cells of f8, smaller than most flat fields of a picture
HIGH_PASS_RADIUS = 3  # pixels: three sigma, 99.7 % of the blur


@dataclass
class LossConfig:
    """Weights of the reconstruction losses and of the KL divergence. A weight of 0 costs no computation."""

    likelihood: Likelihood = "gaussian"
    """Distribution of an image given the decoder's output: the squared error, its logarithm image by image
    (student_t), the absolute or the binary cross-entropy error. PSNR, a mean of logarithms, is what student_t
    optimises. A bernoulli decoder still puts out pixels in [-1, 1]."""
    scale: PositiveFloat | Literal["per_pixel"] = 1.0
    """Sigma of the gaussian and the student_t or b of the laplace, in pixel units of [-1, 1]; the start of a
    learned scale. At 1 the gaussian is half the summed squared error, as in most published recipes. per_pixel: one for
    every pixel of every image, by a second last convolution that is not saved (gaussian and laplace)."""
    learn_scale: bool = False
    """Optimise one global log-scale with the weights; it settles at the root mean square error (gaussian), that
    of a typical image (student_t) or the mean absolute error (laplace). The KL then counts less beside the
    likelihood: for the gaussian as if its weight were scale^2 times the one given."""
    kl_weight: NonNegativeFloat = 1e-6
    """Factor of the KL in nats per image, against the likelihood in nats per image (both sums). 1 is the
    evidence lower bound, 1e-6 that of latent diffusion. The start value where a rate target is given."""
    kl_warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the KL weight rises linearly from 0. A rate target takes over after them."""
    free_bits: NonNegativeFloat = 0.0
    """Bits per latent element that cost nothing: the floor under each channel's KL, averaged over the batch
    and the cells of the channel (Kingma et al. 2016, section C.8)."""
    target_bits: PositiveFloat | None = None
    """Rate control: the KL in bits per latent element that the KL weight is steered to."""
    target_std: OpenUnitInterval | None = None
    """Rate control: the posterior's standard deviation, in units of the latent's own, between 0 and 1, that
    the KL weight is steered to; the geometric mean over the channels."""
    lpips_weight: NonNegativeFloat = 0.0
    """Factor of LPIPS, a mean per image, beside the likelihood in nats per pixel-channel: 0.1 with the
    gaussian of scale 1, 2 to 9 with the student_t."""
    lpips_net: LpipsNet = "vgg"
    """The network of LPIPS."""
    lpips_weights: str | None = None
    """A local safetensors file with the network's weights; downloaded where none is given."""
    high_frequency_weight: NonNegativeFloat = 0.0
    """Factor of the mean absolute error of what a gaussian blur of one pixel takes away (LiteVAE)."""
    low_frequency_weight: NonNegativeFloat = 0.0
    """Factor of the mean absolute error of the means of 16 x 16 pixels. It keeps colours and flat fields true, which
    the squared error of single pixels hardly sees."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for keys that contradict each other."""
        if self.target_bits is not None and self.target_std is not None:
            raise ValueError(
                "loss.target_bits and loss.target_std both steer the KL weight; give one of them"
            )
        if self.learn_scale and self.likelihood == "bernoulli":
            raise ValueError("loss.learn_scale: loss.likelihood bernoulli has no scale to learn")
        if self.has_pixel_scale and self.likelihood not in ("gaussian", "laplace"):
            raise ValueError(
                f"loss.scale per_pixel: loss.likelihood {self.likelihood} has no scale for each pixel"
            )
        if self.has_pixel_scale and self.learn_scale:
            raise ValueError(
                "loss.scale per_pixel is learned anyway; leave out loss.learn_scale, of one scale for all"
            )

    @property
    def fetches_lpips(self) -> bool:
        """Whether the network of LPIPS may have to come from the internet."""
        return self.lpips_weight > 0 and self.lpips_weights is None

    @property
    def has_pixel_scale(self) -> bool:
        """Whether every pixel has a learned scale of its own."""
        return self.scale == "per_pixel"


def objective(losses: Mapping[str, Tensor], weights: Mapping[str, float | Tensor], dimensions: int) -> Tensor:
    """The scalar to minimise: the weighted sum of the batch means, nll and kl divided by D.

    losses: by name, each [B] or a scalar. "nll" and "kl" are sums over an image in nats, every other one is a
    mean per image. weights: a factor for every name, that of "nll" usually 1. dimensions: D = C H W.
    """
    assert losses.keys() == weights.keys(), f"losses {sorted(losses)} against weights {sorted(weights)}"
    summed = {"nll", "kl"}
    terms = [weights[k] * losses[k].mean() / (dimensions if k in summed else 1) for k in losses]
    return torch.stack(terms).sum()


def negative_log_likelihood(
    likelihood: Likelihood, y: Tensor, x: Tensor, log_scale: Tensor | float
) -> Tensor:
    """[B] nats, summed over an image: -log p(x | y) with y the decoder's output; one of the four below."""
    match likelihood:
        case "gaussian":
            return gaussian_nll(y, x, log_scale)
        case "student_t":
            return student_t_nll(y, x, log_scale)
        case "laplace":
            return laplace_nll(y, x, log_scale)
        case "bernoulli":
            return bernoulli_nll(y, x)


def gaussian_nll(y: Tensor, x: Tensor, log_scale: Tensor | float) -> Tensor:
    """[B] nats, summed over an image: -log N(x; y, sigma^2) with sigma = e^log_scale in pixel units.

    = sum (x - y)^2 / (2 sigma^2) + log sigma + log(2 pi) / 2. log_scale is one scalar, whose optimum as a learned
    parameter is the root mean square error (Rybkin et al., "Simple and effective VAE training", 2021), or [B, C, H, W].
    """
    log_scale = torch.as_tensor(log_scale, dtype=torch.float32, device=x.device)
    error = (x.float() - y.float()) * torch.exp(-log_scale)
    return (error.square() / 2 + log_scale + math.log(2 * math.pi) / 2).flatten(1).sum(1)


def student_t_nll(y: Tensor, x: Tensor, log_scale: Tensor | float) -> Tensor:
    """[B] nats, summed over an image: a gaussian whose sigma^2 is unknown, an image at a time.

    With the prior InverseGamma(D / 2, D s^2 / 2) of sigma^2 the image is a multivariate Student t with D degrees of
    freedom and scale s = e^log_scale, and -log p = D log(1 + mse / s^2) + D log s + D log(D pi) / 2 + log G(D / 2)
    - log G(D) with the gamma function G. An image far above s counts by its PSNR, one far below by its squared error,
    since a small crop with little in it says nothing of the rest of its image. Learned, s is where the mean of
    mse / (s^2 + mse) is 1/2.
    """
    log_scale = torch.as_tensor(log_scale, dtype=torch.float32, device=x.device)
    error = ((x.float() - y.float()) * torch.exp(-log_scale)).square().flatten(1)
    D = error.shape[1]
    constant = D * math.log(D * math.pi) / 2 + math.lgamma(D / 2) - math.lgamma(D)
    return D * (torch.log1p(error.mean(1)) + log_scale) + constant


def laplace_nll(y: Tensor, x: Tensor, log_scale: Tensor | float) -> Tensor:
    """[B] nats, summed over an image: -log Laplace(x; y, b) = sum |x - y| / b + log 2b, b = e^log_scale.

    As a learned parameter log_scale is one scalar; its optimum is the mean absolute error.
    """
    log_scale = torch.as_tensor(log_scale, dtype=torch.float32, device=x.device)
    error = (x.float() - y.float()).abs() * torch.exp(-log_scale)
    return (error + log_scale + math.log(2)).flatten(1).sum(1)


def bernoulli_nll(y: Tensor, x: Tensor) -> Tensor:
    """[B] nats, summed over an image: binary cross-entropy of the pixels as probabilities.

    = -sum t log p + (1 - t) log(1 - p) with t = (x + 1) / 2 and p = (y + 1) / 2. The decoder's output is
    the pixel itself and not a logit, so that the saved codec decodes to pixels: p is kept half an 8-bit
    level from 0 and 1, in (1/512, 511/512). Beyond, the gradient passes straight through where the target
    lies inside, so that an output out of range returns, and is zero where the target lies at the same end,
    so that an output does not run away.
    """
    low, high = 1 / 512, 511 / 512
    t = (x.float() + 1) / 2
    raw = (y.float() + 1) / 2
    p = raw.clamp(low, high)
    returns = (t - p) * (p - raw) > 0  # outside, and the target is on the inner side
    p = p + torch.where(returns, raw - raw.detach(), 0.0)
    return -(t * torch.log(p) + (1 - t) * torch.log1p(-p)).flatten(1).sum(1)


def bits_per_dimension(nll: Tensor, dimensions: int, likelihood: Likelihood) -> Tensor:
    """Nats per image -> bits per 8-bit pixel-channel, same shape; nll + kl gives a bound on the code length.

    A density in units of [-1, 1] gives a level the probability density / 127.5, hence + log2(127.5) bits;
    this holds while the scale is well above a level, 1/127.5. The bernoulli is no density and gets no such
    term.
    """
    bits = nll / (dimensions * math.log(2))
    return bits if likelihood == "bernoulli" else bits - math.log2(PIXEL_STEP)


def kl_elements(mean: Tensor, logvar: Tensor) -> Tensor:
    """[B, c, h, w] nats: KL(N(mean, e^logvar) || N(0, 1)) = (mean^2 + e^logvar - 1 - logvar) / 2."""
    return (mean.square() + logvar.exp() - 1 - logvar) / 2


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """[B] nats: the KL of the posterior against the standard normal, summed over an image's latent."""
    return kl_elements(mean, logvar).flatten(1).sum(1)


def kl_per_channel(mean: Tensor, logvar: Tensor) -> Tensor:
    """[c] nats per latent element: the KL averaged over the batch and the cells of each channel."""
    return kl_elements(mean, logvar).mean((0, 2, 3))


def kl_with_free_bits(per_channel: Tensor, reference: Tensor, cells: int, free_bits: float) -> Tensor:
    """The KL to minimise in nats per image, a scalar: cells * sum over channels of max(kl_c, free_bits ln 2).

    per_channel: `kl_per_channel` of this batch. reference: [c], the same mean over the whole optimizer step
    (all processes and micro-batches, or the step before), which decides the channels that are at their
    floor and get no gradient. It must be the same everywhere: the maximum of a mean is not the mean of the
    maxima, so without it N processes would differ from one. cells: h w.
    """
    floor = free_bits * math.log(2)
    return cells * torch.where(reference > floor, per_channel, floor).sum()


def low_frequency_loss(y: Tensor, x: Tensor) -> Tensor:
    """[B], mean per image in pixel units: |P (x - y)| with P the means of blocks of 16 x 16 pixels."""
    return F.avg_pool2d(y - x, FLAT_SIDE, ceil_mode=True).abs().mean((1, 2, 3))


def high_frequency_loss(y: Tensor, x: Tensor) -> Tensor:
    """[B], mean per image in pixel units: |(x - G x) - (y - G y)| with G a gaussian blur of sigma one pixel.

    The high-frequency loss of LiteVAE (Sadat et al. 2024), which does not state its filter; ours has 7 x 7
    taps and repeats the border. G is linear, so one blur of the difference is enough.
    """
    difference = x.float() - y.float()
    return (difference - gaussian_blur(difference)).abs().flatten(1).mean(1)


def gaussian_blur(x: Tensor) -> Tensor:
    """[B, C, H, W] -> the same: each channel with a gaussian of sigma one pixel; the border is repeated."""
    r = HIGH_PASS_RADIUS
    taps = torch.exp(-torch.arange(-r, r + 1, device=x.device).square() / (2 * HIGH_PASS_SIGMA**2))
    taps = taps / taps.sum()
    flat = F.pad(x.flatten(0, 1)[:, None], (r, r, r, r), mode="replicate")  # [B C, 1, H + 2r, W + 2r]
    flat = F.conv2d(F.conv2d(flat, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))
    return flat.view(x.shape)
