"""What one training sample goes through, and every loss that judges the result, by name.

The formulas are in `losses.py` and `regularizers.py`; here they meet the configuration. Random draws are functions
of (seed, position) or (seed, draw), where `draw` counts the global batches of the run.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f downsampling factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentcodec.quality.perceptual import Perceptual
from latentcodec.randomness import Purpose, keyed_normal
from latentcodec.training.losses.regularizers import (
    add_noise,
    downscale_pair,
    draw_downscale,
    draw_masked_diagonals,
    draw_noise_levels,
    draw_warp,
    interpolate_noise,
    latent_tail_loss,
    mask_spectrum,
    spectrum_loss,
    variance_expansion_loss,
    warp_image,
    warp_latent,
)
from latentcodec.training.losses.terms import (
    LossConfig,
    bits_of_std,
    bits_per_dimension,
    bits_per_element,
    channel_statistics,
    high_frequency_loss,
    kl_divergence,
    kl_per_channel,
    kl_warmup,
    kl_with_free_bits,
    negative_log_likelihood,
    next_kl_weight,
    relative_std,
)
from latentcodec.training.start.model import Pass

if TYPE_CHECKING:
    from latentcodec.training.config import Config

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    """What the model is given for one micro-batch, and what it is held against."""

    x: Tensor
    """[B, C, H, W]: what is encoded."""
    noise: Tensor
    """[B, c, h, w]: standard normal, for the posterior's draw."""
    transforms: list[Transform]
    """Latent -> latent, in this order, before the decoder."""
    target: Tensor
    """[B, C, H', W']: what the reconstruction should be."""

    def transform(self, z: Tensor) -> Tensor:
        """The latent as the decoder gets it."""
        for step in self.transforms:
            z = step(z)
        return z


class RateControl:
    """The KL weight of each step, and the statistics of the step before that free bits and a target need."""

    def __init__(self, config: LossConfig, latent_channels: int) -> None:
        self.config = config
        self.weight = config.kl_weight
        self.reference = torch.zeros(latent_channels)  # [c] nats per element, of the step before

    def at(self, step: int) -> float:
        """The weight that counts at an optimizer step."""
        return self.weight * kl_warmup(step, self.config.kl_warmup_steps)

    def update(self, step: int, per_channel: Tensor, statistics: Tensor) -> dict[str, float]:
        """Take in the whole step's statistics ([c] and [3, c], means over all processes) and steer the weight."""
        config, self.reference = self.config, per_channel
        rate, std = bits_per_element(per_channel), relative_std(statistics)
        report = {"kl_weight": self.at(step), "latent_bits": rate, "latent_noise": std}
        if step >= config.kl_warmup_steps and config.target_bits is not None:
            self.weight = next_kl_weight(self.weight, rate, config.target_bits)
        elif step >= config.kl_warmup_steps and config.target_std is not None:
            self.weight = next_kl_weight(self.weight, bits_of_std(std), bits_of_std(config.target_std))
        return report

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"weight": self.weight, "reference": self.reference.tolist()}

    def load(self, numbers: dict[str, Any]) -> None:
        """Go on from a checkpoint; the weight is the configuration's, except where a target has moved it."""
        self.reference = torch.tensor(numbers["reference"])
        if self.config.target_bits is not None or self.config.target_std is not None:
            self.weight = numbers["weight"]


class Objective:
    """The losses of a run: which ones count, with which weight, on what."""

    def __init__(self, config: Config, latent_channels: int, f: int, device: torch.device) -> None:
        self.config, self.f, self.latent_channels = config, f, latent_channels
        self.seed = config.train.seed
        self.rate = RateControl(config.loss, latent_channels)
        self.lpips = None
        if config.loss.lpips_weight:
            self.lpips = Perceptual(config.loss.lpips_net, config.loss.lpips_weights).to(device)

    def inputs(self, x: Tensor, positions: Tensor, draw: int) -> Inputs:
        """Draw everything random for pixels x [B, C, H, W] at `positions` [B] of the stream."""
        settings = self.config.regularizer
        warp = draw_warp(settings, self.seed, draw)
        if warp is not None and not warp.of_latent:
            x = warp_image(x, warp, self.f)
        cells = (self.latent_channels, x.shape[2] // self.f, x.shape[3] // self.f)
        target, transforms = x, list[Transform]()
        if settings.spectrum_masking:
            diagonals = draw_masked_diagonals(self.seed, draw)
            target = mask_spectrum(target, diagonals)
            transforms.append(lambda z: mask_spectrum(z, diagonals))
        if warp is not None and warp.of_latent:
            target = warp_image(target, warp, self.f)
            transforms.append(lambda z: warp_latent(z, warp))
        if settings.latent_noise_share:
            transforms.append(self._noise_transform(positions))
        noise = keyed_normal(self.seed, positions, cells, Purpose.POSTERIOR).to(x.device)
        return Inputs(x, noise, transforms, target)

    def losses(
        self, result: Pass, inputs: Inputs, step: int, draw: int, decode: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Every loss that counts, [B] or a scalar, and the weight of each; `decode` is the decoder's forward."""
        loss, settings = self.config.loss, self.config.regularizer
        y, target = result.reconstruction, inputs.target
        losses = {
            "nll": negative_log_likelihood(loss.likelihood, y, target, result.log_scale),
            "kl": self._kl(result),
        }
        weights = {"nll": 1.0, "kl": self.rate.at(step)}

        def add(name: str, weight: float, value: Callable[[], Tensor]) -> None:
            if weight:
                losses[name], weights[name] = value(), weight

        if self.lpips is not None:
            losses["lpips"], weights["lpips"] = self.lpips(y, target), loss.lpips_weight
        add("high_frequency", loss.high_frequency_weight, lambda: high_frequency_loss(y, target))
        flattening, floor = settings.spectrum_flattening, settings.variance_expansion_floor
        add("spectrum", settings.spectrum_weight, lambda: spectrum_loss(result.latent, inputs.x, flattening))
        expansion = settings.variance_expansion_weight
        add("variance_expansion", expansion, lambda: variance_expansion_loss(result.logvar, floor))
        add("latent_tail", settings.latent_tail_weight, lambda: latent_tail_loss(result.latent))
        scaled = settings.scale_equivariance_weight
        add("scale_equivariance", scaled, lambda: self._scale_equivariance(result, inputs.x, draw, decode))
        return losses, weights

    def measures(self, result: Pass, nll: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What is only looked at, or steers the next step: no gradient, means over the batch."""
        with torch.no_grad():
            channels = kl_per_channel(result.mean, result.logvar)
            statistics = channel_statistics(result.mean, result.logvar).flatten()
            return {
                "mse": (result.reconstruction - target).square().mean(),
                "bits_per_dimension": bits_per_dimension(nll, target[0].numel(), self.config.loss.likelihood),
                "scale": result.log_scale.exp(),
                **{f"channel_kl/{i}": value for i, value in enumerate(channels)},
                **{f"channel_statistic/{i}": value for i, value in enumerate(statistics)},
            }

    def after_step(self, step: int, report: dict[str, float]) -> dict[str, float]:
        """Hand the step's channel statistics, taken out of `report`, to the rate control; what it reports."""
        c = self.latent_channels
        per_channel = torch.tensor([report.pop(f"channel_kl/{i}") for i in range(c)])
        statistics = torch.tensor([report.pop(f"channel_statistic/{i}") for i in range(3 * c)]).view(3, c)
        return self.rate.update(step, per_channel, statistics)

    def _kl(self, result: Pass) -> Tensor:
        if not self.config.loss.free_bits:
            return kl_divergence(result.mean, result.logvar)
        per_channel = kl_per_channel(result.mean, result.logvar)
        cells = result.mean[0, 0].numel()
        return kl_with_free_bits(
            per_channel, self.rate.reference.to(per_channel), cells, self.config.loss.free_bits
        )

    def _noise_transform(self, positions: Tensor) -> Transform:
        """The noise that the decoder is trained to stand, sample by sample."""
        settings = self.config.regularizer
        share = settings.latent_noise_share
        replaced = draw_noise_levels(share, settings.interpolative_noise, self.seed, positions)
        added = draw_noise_levels(share, settings.additive_noise, self.seed, positions)

        def transform(z: Tensor) -> Tensor:
            noise = keyed_normal(self.seed, positions, tuple(z.shape[1:]), Purpose.LATENT_NOISE).to(z)
            z = interpolate_noise(z, noise, replaced.to(z), settings.interpolative_noise_std)
            return add_noise(z, noise, added.to(z))

        return transform

    def _scale_equivariance(
        self, result: Pass, x: Tensor, draw: int, decode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        small_x, small_z = downscale_pair(x, result.latent, draw_downscale(self.seed, draw))
        y = decode(small_z).float()
        return (
            negative_log_likelihood(self.config.loss.likelihood, y, small_x, result.log_scale)
            / small_x[0].numel()
        )
