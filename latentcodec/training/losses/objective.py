"""Every loss of a run by name: which ones count, with which weight, on what.

The formulas are in `terms.py`, `regularizers.py` and `spectra.py`, the random draws in `sample.py`, the weight of the
KL divergence in `rate.py`; here they meet the configuration.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f downsampling factor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentcodec.quality.perceptual import Perceptual
from latentcodec.training.losses.rate import RateControl, channel_statistics
from latentcodec.training.losses.regularizers import (
    RegularizerConfig,
    downscale_pair,
    draw_downscale,
    latent_tail_loss,
    round_trip_loss,
    unit_of,
    variance_expansion_loss,
)
from latentcodec.training.losses.sample import ForwardPass, Inputs, draw_inputs
from latentcodec.training.losses.spectra import spectrum_loss
from latentcodec.training.losses.terms import (
    LossConfig,
    bits_per_dimension,
    high_frequency_loss,
    kl_divergence,
    kl_per_channel,
    kl_with_free_bits,
    low_frequency_loss,
    negative_log_likelihood,
)


class Objective:
    """The losses of a run, for latents of `latent_channels` channels and a downsampling factor of `f`."""

    def __init__(
        self,
        loss: LossConfig,
        regularizer: RegularizerConfig,
        seed: int,
        latent_channels: int,
        f: int,
        whole: int,
        device: torch.device,
    ) -> None:
        """f and `whole`: pixels along each side of a raw cell and of a latent cell (`draw_inputs`)."""
        self.loss, self.regularizer, self.seed = loss, regularizer, seed
        self.latent_channels, self.f, self.whole = latent_channels, f, whole
        self.rate = RateControl(loss, latent_channels)
        self.lpips: Perceptual | None = None
        if loss.lpips_weight:
            self.lpips = Perceptual(loss.lpips_net, loss.lpips_weights).to(device)

    def inputs(self, x: Tensor, positions: Tensor, draw: int, recode: Callable[[Tensor], Tensor]) -> Inputs:
        """What is random for pixels x [B, C, H, W] at `positions` [B] of the stream is drawn.

        `recode` is the codec's round trip, image to image, for the samples that have been through it before.
        """
        shape = self.latent_channels, self.f, self.whole
        return draw_inputs(self.regularizer, self.seed, *shape, x, positions, draw, self._unit, recode)

    def losses(
        self,
        result: ForwardPass,
        inputs: Inputs,
        step: int,
        draw: int,
        decode: Callable[[Tensor], Tensor],
        encode: Callable[[Tensor], Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Every loss that counts, [B] or a scalar, and the weight of each.

        `decode` is the decoder's forward; `encode` gives the posterior's mean of an image.
        """
        loss, settings = self.loss, self.regularizer
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
        add("low_frequency", loss.low_frequency_weight, lambda: low_frequency_loss(y, target))
        add("round_trip", settings.round_trip_weight, lambda: self._round_trip(result, inputs, encode))
        flattening, floor = settings.spectrum_flattening, settings.variance_expansion_floor
        add("spectrum", settings.spectrum_weight, lambda: spectrum_loss(result.latent, inputs.x, flattening))
        expansion = settings.variance_expansion_weight
        add("variance_expansion", expansion, lambda: variance_expansion_loss(result.logvar, floor))
        add("latent_tail", settings.latent_tail_weight, lambda: latent_tail_loss(result.latent))
        scaled = settings.scale_equivariance_weight
        add(
            "scale_equivariance", scaled, lambda: self._scale_equivariance(result, inputs.image, draw, decode)
        )
        return losses, weights

    def measures(self, result: ForwardPass, nll: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Numbers for the metrics and for the rate control, not losses: no gradient, means over the batch."""
        with torch.no_grad():
            channels = kl_per_channel(result.mean, result.logvar)
            kl = kl_divergence(result.mean, result.logvar).mean()
            statistics = channel_statistics(result.mean, result.logvar).flatten()
            return {
                "mse": (result.reconstruction - target).square().mean(),
                "bits_per_dimension": bits_per_dimension(nll + kl, target[0].numel(), self.loss.likelihood),
                "scale": result.log_scale.exp().mean(),
                **{f"channel_kl/{i}": value for i, value in enumerate(channels)},
                **{f"channel_statistic/{i}": value for i, value in enumerate(statistics)},
            }

    def after_step(self, step: int, report: dict[str, float]) -> dict[str, float]:
        """Give the step's channel statistics, removed from `report`, to the rate control; returns what it reports."""
        c = self.latent_channels
        per_channel = torch.tensor([report.pop(f"channel_kl/{i}") for i in range(c)])
        statistics = torch.tensor([report.pop(f"channel_statistic/{i}") for i in range(3 * c)]).view(3, c)
        return self.rate.update(step, per_channel, statistics)

    def _kl(self, result: ForwardPass) -> Tensor:
        if not self.loss.free_bits:
            return kl_divergence(result.mean, result.logvar)
        per_channel = kl_per_channel(result.mean, result.logvar)
        cells = result.mean[0, 0].numel()
        return kl_with_free_bits(per_channel, self.rate.reference.to(per_channel), cells, self.loss.free_bits)

    def _round_trip(self, result: ForwardPass, inputs: Inputs, encode: Callable[[Tensor], Tensor]) -> Tensor:
        decoded = inputs.transform_without_noise(result.mean)
        return round_trip_loss(encode(result.reconstruction), decoded, self._unit(result.mean))

    def _unit(self, z: Tensor) -> Tensor:
        """[B, c, 1, 1]: the unit of noise and distances for latents z [B, c, h, w]."""
        return unit_of(z, self.rate.centre, self.rate.deviation)

    def _scale_equivariance(
        self, result: ForwardPass, x: Tensor, draw: int, decode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        small_x, small_z = downscale_pair(x, result.latent, draw_downscale(self.seed, draw))
        y = decode(small_z).float()
        return (
            negative_log_likelihood(self.loss.likelihood, y, small_x, result.log_scale) / small_x[0].numel()
        )
