"""What makes a latent space easier for a diffusion model, each a pure function: no network and no state.

Each loss is a mean per image, [B]. What transforms image and latent alike takes its draw as an argument;
the draws are functions of (seed, optimizer step) or (seed, sample position), the same on every process. The
order in the training step: `draw_...` -> earlier round trips (generations.py) -> encode -> transform z and the
target -> decode -> terms.py. What concerns spectra is in spectra.py.

Shapes: B batch, C image channels, H W pixels, c latent channels, h w latent cells, f downsampling factor.
Pixels are in [-1, 1]; z is the sampled latent as it enters the decoder, in its raw units.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt
from torch import Tensor
from torch.nn import functional as F

from latentcodec.randomness import Purpose, keyed_generator, keyed_uniform

# EQ-VAE draws from j / 32, j = 8..31; with six of them there are few image sizes, and so few compiled graphs.
EQUIVARIANCE_SCALES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
DOWNSCALE_FACTORS = (2, 4)  # Skorokhodov et al.


@dataclass
class RegularizerConfig:
    """Weights and probabilities of the regularizers; all are off, and what is off costs no computation."""

    equivariance_probability: ClosedUnitInterval = 0.0
    """Share of the optimizer steps in which latent and target are rotated and scaled alike (EQ-VAE: 0.5)."""
    low_resolution_probability: ClosedUnitInterval = 0.0
    """Share of the other steps in which the image is scaled down before it is encoded (EQ-VAE: 0.25)."""
    latent_noise_share: ClosedUnitInterval = 0.0
    """Share of the samples whose latent gets noise on its way to the decoder (l-DeTok: 1)."""
    interpolative_noise: ClosedUnitInterval = 0.0
    """Largest part of the latent, 0 to 1, that such a sample has replaced by noise; the part is uniform
    below it (l-DeTok: 1)."""
    interpolative_noise_std: NonNegativeFloat = 3.0
    """Standard deviation of that noise in the latent's raw units (l-DeTok: 3)."""
    additive_noise: NonNegativeFloat = 0.0
    """Largest standard deviation of the noise added to such a sample, in units of each channel's own deviation; uniform
    below it (RAE: 0.8, in raw units). The unit grows with the latents, so larger ones gain nothing."""
    round_trip_weight: NonNegativeFloat = 0.0
    """Factor of the mean squared distance, in units of each channel's variance, between the latent of an image and the
    latent of its reconstruction. With it, a picture that is encoded and decoded many times changes less. Costs a second
    encoding."""
    generations_share: ClosedUnitInterval = 0.0
    """Share of the samples that are pictures after several round trips through the codec; their target is the picture
    after the first one. With it, pictures that are encoded and decoded many times drift less. For a codec that is
    trained already: the pictures of a new one are noise."""
    generations: NonNegativeInt = 0
    """Largest number of these round trips; 1 up to this are equally likely. Each is one more forward pass, without
    gradient, of the samples that need it."""
    scale_equivariance_weight: NonNegativeFloat = 0.0
    """Factor of the reconstruction loss of the downscaled image from the downscaled latent, in nats per
    pixel-channel like the likelihood itself (Skorokhodov et al.: about 0.25). Costs a second, smaller
    decoding."""
    spectrum_weight: NonNegativeFloat = 0.0
    """Factor of the divergence between the spectra of image and latent, in nats (ESM: 0.01)."""
    spectrum_flattening: NonNegativeFloat = 1.0
    """Power of the frequency by which the image's spectrum is flattened before it is the target (ESM: 1)."""
    spectrum_masking: bool = False
    """Mask the same high frequencies of 8 x 8 blocks in latent and target (DSM). Needs latents whose sides
    are multiples of 8 cells."""
    variance_expansion_weight: NonNegativeFloat = 0.0
    """Factor of the mean inverse posterior variance, which keeps the posterior wide in place of the KL (VE
    loss: 0.1, beside a likelihood whose reduction we do not know)."""
    variance_expansion_floor: NonNegativeFloat = 1e-2
    """Added to the variance there, so that the loss stays below its inverse. Our value, not the source's."""
    latent_tail_weight: NonNegativeFloat = 0.0
    """Factor of the mean of e^(|z| - 1), which bounds the latent where there is no KL (VE loss: 1e-6)."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for noise or round trips that no sample would get."""
        if (self.latent_noise_share > 0) != (self.interpolative_noise > 0 or self.additive_noise > 0):
            raise ValueError(
                "regularizer.latent_noise_share says who gets noise, regularizer.interpolative_noise and "
                "regularizer.additive_noise how much; one without the other does nothing"
            )
        if (self.generations_share > 0) != (self.generations > 0):
            raise ValueError(
                "regularizer.generations_share says which samples have been through the codec before, "
                "regularizer.generations how often; one without the other does nothing"
            )


# ---- equivariance: the same transform of latent and image ----


@dataclass(frozen=True)
class Warp:
    """The transform of one optimizer step: a scale, then quarter turns."""

    scale: float
    """Side of the result over side of the original, at most 1."""
    turns: int
    """Quarter turns, 0 to 3."""
    of_latent: bool
    """True: after the encoder, of latent and target (the regularizer). False: of the image before the
    encoder, so that small images stay in the training set."""


def draw_warp(config: RegularizerConfig, seed: int, step: int) -> Warp | None:
    """What EQ-VAE does in this optimizer step, None for nothing: the same on every process."""
    generator = keyed_generator(seed, Purpose.EQUIVARIANCE, step)
    chance = torch.rand(2, generator=generator).tolist()
    scale = EQUIVARIANCE_SCALES[int(torch.randint(len(EQUIVARIANCE_SCALES), (), generator=generator))]
    if chance[0] < config.equivariance_probability:
        return Warp(scale, int(torch.randint(1, 4, (), generator=generator)), of_latent=True)
    if chance[1] < config.low_resolution_probability:
        return Warp(scale, 0, of_latent=False)
    return None


def warp_latent(z: Tensor, warp: Warp) -> Tensor:
    """[B, c, h, w] -> the scaled and turned latent: the implicit equivariance of EQ-VAE.

    EQ-VAE (Kouzelis et al. 2025): the whole reconstruction loss becomes L(D(T z), T x), with T a bilinear
    scale and rot90^k; the KL stays that of the posterior of x. Both are sums, as in latent diffusion's own loss, so
    in a step of scale s the KL counts 1 / s^2 times as much beside the likelihood. A scale rounds to whole cells, at
    least one.
    The explicit form |T E(x) - E(T x)|^2 collapses the latent (their table 7) and is not offered.
    """
    return _warp(z, warp, _scaled(z.shape[-2:], warp.scale))


def warp_image(x: Tensor, warp: Warp, f: int) -> Tensor:
    """[B, C, H, W] -> the image that belongs to the warped latent, f times its cells; H and W multiples of
    f."""
    rows, columns = _scaled((x.shape[-2] // f, x.shape[-1] // f), warp.scale)
    return _warp(x, warp, (rows * f, columns * f))


def _warp(t: Tensor, warp: Warp, size: tuple[int, int]) -> Tensor:
    return torch.rot90(
        F.interpolate(t, size=size, mode="bilinear", align_corners=False), warp.turns, (-2, -1)
    )


def _scaled(size: tuple[int, int] | torch.Size, scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def draw_downscale(seed: int, step: int) -> int:
    """The factor 2 or 4 of the scale equivariance loss in this optimizer step."""
    generator = keyed_generator(seed, Purpose.DOWNSCALE, step)
    return DOWNSCALE_FACTORS[int(torch.randint(len(DOWNSCALE_FACTORS), (), generator=generator))]


def downscale_pair(x: Tensor, z: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Image and latent, both smaller by the factor: the pair of the scale equivariance loss.

    Skorokhodov et al., "Improving the diffusability of autoencoders", 2025: L = d(x, D(z)) + weight d(x',
    D(z')) with x', z' bilinearly downscaled and d the reconstruction loss of the run, here per
    pixel-channel of x'. Both are low-pass filtered on the way (antialias), since what the loss teaches is
    that the low frequencies of the latent are those of the image. The sides shrink to whole cells, at least
    one.
    """
    f = x.shape[-1] // z.shape[-1]
    rows, columns = _scaled(z.shape[-2:], 1 / factor)
    return _shrink(x, (rows * f, columns * f)), _shrink(z, (rows, columns))


def _shrink(t: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(t, size, mode="bilinear", align_corners=False, antialias=True)


# ---- noise on the latent ----


def draw_noise_levels(
    config: RegularizerConfig, seed: int, positions: Iterable[int] | Tensor
) -> tuple[Tensor, Tensor]:
    """The levels [B] of `interpolate_noise` and of `add_noise`, on the CPU, keyed by position.

    A sample gets noise with probability `latent_noise_share`, else both levels are 0. The two levels are independent
    and uniform, up to `interpolative_noise` and `additive_noise`.
    """
    chance, *levels = keyed_uniform(seed, positions, (3,), Purpose.LATENT_NOISE_LEVEL).unbind(1)
    chosen = chance < config.latent_noise_share
    replaced, added = (torch.where(chosen, level, 0.0) for level in levels)
    return config.interpolative_noise * replaced, config.additive_noise * added


def interpolate_noise(z: Tensor, noise: Tensor, level: Tensor, std: float) -> Tensor:
    """[B, c, h, w]: (1 - level) z + level std noise, level [B] in 0..1; l-DeTok (Yang et al. 2025), std 3."""
    level = level.view(-1, 1, 1, 1)
    return (1 - level) * z + level * std * noise


def unit_of(z: Tensor, centre: Tensor, deviation: Tensor) -> Tensor:
    """[B, c, 1, 1] float32: `deviation` [c] of each channel, which grows where a sample of z [B, c, h, w] grows.

    The value is that of the step before, the same for all samples. The gradient is that of each sample's mean square
    distance from `centre` [c], so that over many samples latents k times as large have a unit k times as large: without
    it an encoder escapes from noise by growing a little in each step. It depends on no other sample, so it is the same
    however a batch is split.
    """
    centre, deviation = (
        value.to(z.device).float().view(-1, 1, 1) for value in (centre, deviation.clamp_min(1e-6))
    )
    power = (z.float() - centre).square().mean((2, 3), keepdim=True)
    return deviation + (power - power.detach()) / (2 * deviation)


def add_noise(z: Tensor, noise: Tensor, level: Tensor, unit: Tensor) -> Tensor:
    """[B, c, h, w]: z + level unit noise, level [B], unit [B or 1, c, 1, 1] (`unit_of`).

    The decoder noise of RAE (Zheng et al. 2025), which has it in raw units.
    """
    return z + level.view(-1, 1, 1, 1) * unit * noise


def round_trip_loss(again: Tensor, mean: Tensor, unit: Tensor) -> Tensor:
    """[B]: the mean squared distance of two latents [B, c, h, w], in squares of `unit` [B or 1, c, 1, 1] (`unit_of`).

    `again` is the posterior's mean of the reconstruction, `mean` that of the image, with the transforms of the step.
    """
    return ((again - mean) / unit).square().mean((1, 2, 3))


# ---- variance expansion (Li et al., "Taming sampling perturbations", 2026) ----


def variance_expansion_loss(logvar: Tensor, floor: float) -> Tensor:
    """[B], mean over the latent elements of an image: 1 / (sigma^2 + floor), sigma^2 = e^logvar.

    The reconstruction loss shrinks the posterior's variance, this one widens it most where it is smallest: an
    equilibrium at each element in place of the KL's pull to one.
    """
    return (1 / (logvar.exp() + floor)).flatten(1).mean(1)


def latent_tail_loss(z: Tensor) -> Tensor:
    """[B], mean over the latent elements of an image: e^(|z| - 1). Nothing else bounds a latent without a
    KL."""
    return torch.exp(z.abs() - 1).flatten(1).mean(1)
