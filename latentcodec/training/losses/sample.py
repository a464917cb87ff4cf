"""What one micro-batch is given and gives: pixels, noise and transforms in, posterior and reconstruction out.

Every random draw of the objective is made here. A draw is a function of (seed, position) where each sample has its
own, and of (seed, draw) where a whole step shares it; `draw` counts the global batches of the run.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f downsampling factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from latentcodec.randomness import Purpose, keyed_normal
from latentcodec.training.losses.generations import after_round_trips, draw_generations
from latentcodec.training.losses.regularizers import (
    RegularizerConfig,
    add_noise,
    draw_noise_levels,
    draw_warp,
    interpolate_noise,
    warp_image,
    warp_latent,
)
from latentcodec.training.losses.spectra import draw_masked_diagonals, mask_spectrum

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    """What the model is given for one micro-batch, and what its output is compared with."""

    x: Tensor
    """[B, C, H, W]: what is encoded."""
    image: Tensor
    """[B, C, H, W]: the picture that the latent stands for, before the transforms: x, or where x is a picture after
    several round trips, the one after the first."""
    noise: Tensor
    """[B, c, h, w]: standard normal, for the posterior's draw."""
    transforms: list[Transform]
    """Latent -> latent, in this order, before the decoder: what the target has gone through as well."""
    target: Tensor
    """[B, C, H', W']: what the reconstruction should be."""
    latent_noise: Transform | None = None
    """Latent -> latent, after the transforms: noise that the target knows nothing of."""

    def transform(self, z: Tensor) -> Tensor:
        """The latent as the decoder gets it."""
        z = self.transform_without_noise(z)
        return z if self.latent_noise is None else self.latent_noise(z)

    def transform_without_noise(self, z: Tensor) -> Tensor:
        """The latent that belongs to the target."""
        for step in self.transforms:
            z = step(z)
        return z


class ForwardPass(NamedTuple):
    """What one forward pass of training gives to the losses."""

    mean: Tensor
    """[B, c, h, w] float32 of the posterior."""
    logvar: Tensor
    """[B, c, h, w] float32, clamped."""
    latent: Tensor
    """[B, c, h, w] float32: the posterior's draw, before any transform."""
    reconstruction: Tensor
    """[B, C, H, W] float32: what the decoder made of the (transformed) latent."""
    log_scale: Tensor
    """Scalar, or [B, C, H, W]: the logarithm of the likelihood's scale."""


def draw_inputs(
    config: RegularizerConfig,
    seed: int,
    latent_channels: int,
    f: int,
    whole: int,
    x: Tensor,
    positions: Tensor,
    draw: int,
    unit: Callable[[Tensor], Tensor],
    recode: Callable[[Tensor], Tensor],
) -> Inputs:
    """The inputs for pixels x [B, C, H, W] at `positions` [B] of the stream, in global batch `draw`.

    f and `whole`: pixels along each side of a raw cell and of a latent cell, into which a class may pack several raw
    ones. Smaller images have whole latent cells, as a teacher compares them.
    `unit` gives that of the additive noise, [B, c, 1, 1] for a latent; `recode` is the codec's round trip.
    """
    warp = draw_warp(config, seed, draw)
    if warp is not None and not warp.of_latent:
        x = warp_image(x, warp, whole)
    cells = (latent_channels, x.shape[2] // f, x.shape[3] // f)
    image, transforms = x, list[Transform]()
    if config.generations_share:
        x, image = after_round_trips(x, draw_generations(config, seed, positions), recode)
    target = image
    if config.spectrum_masking:
        diagonals = draw_masked_diagonals(seed, draw)
        target = mask_spectrum(target, diagonals)
        transforms.append(lambda z: mask_spectrum(z, diagonals))
    if warp is not None and warp.of_latent:
        target = warp_image(target, warp, f)
        transforms.append(lambda z: warp_latent(z, warp))
    added = _latent_noise(config, seed, positions, unit) if config.latent_noise_share else None
    noise = keyed_normal(seed, positions, cells, Purpose.POSTERIOR).to(x.device)
    return Inputs(x, image, noise, transforms, target, added)


def _latent_noise(
    config: RegularizerConfig, seed: int, positions: Tensor, unit: Callable[[Tensor], Tensor]
) -> Transform:
    """The noise that the decoder learns to tolerate: an amount and a tensor of its own for each sample and kind."""
    replaced, added = draw_noise_levels(config, seed, positions)

    def transform(z: Tensor) -> Tensor:
        def noise(purpose: Purpose) -> Tensor:
            return keyed_normal(seed, positions, tuple(z.shape[1:]), purpose).to(z)

        scale = unit(z).to(z)  # of z itself: what replaces a part of it does not grow with it
        if config.interpolative_noise:
            z = interpolate_noise(
                z, noise(Purpose.INTERPOLATIVE_NOISE), replaced.to(z), config.interpolative_noise_std
            )
        if config.additive_noise:
            z = add_noise(z, noise(Purpose.ADDITIVE_NOISE), added.to(z), scale)
        return z

    return transform
